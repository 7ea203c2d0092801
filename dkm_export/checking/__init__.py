"""Check: every artifact, on every runtime that is here, against the PyTorch reference."""

from dkm_export.checking.runtime import Arrays, InstallableRuntime, NumericClass, Runtime, Session

__all__ = ["Arrays", "InstallableRuntime", "NumericClass", "Runtime", "Session"]
