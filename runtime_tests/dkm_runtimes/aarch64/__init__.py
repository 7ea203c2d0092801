"""Runtimes as they are built for aarch64 Linux, on other machines: emulated, without root."""
