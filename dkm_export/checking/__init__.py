"""Check: every artifact, on every runtime that is here, against the PyTorch reference."""

from dkm_export.checking.bridge import Bridge
from dkm_export.checking.runtime import Arrays, InstallableRuntime, NumericClass, Runtime, Session

__all__ = ["Arrays", "Bridge", "InstallableRuntime", "NumericClass", "Runtime", "Session"]
