"""Runtimes: one module per way to execute an artifact."""
