"""Core ML itself, on a Mac."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dkm_export.checking.runtime import Arrays, NumericClass, Runtime, Session


class CoreMLRuntime(Runtime):
    """``MLModel.predict`` on the compute units that Core ML chooses."""

    name = "coreml"
    target = "coreml"
    where = "Core ML on a Mac"
    packages = ("coremltools",)

    def unavailable(self) -> str | None:
        """Why this runtime cannot run here, or None."""
        if platform.system() != "Darwin":
            return "Core ML runs only on macOS"
        return super().unavailable()

    def load(self, artifact: Path) -> Session:
        """Compile and load a package.

        Raises:
            Unsupported: when the package holds something other than an ML program.
            InvalidInput: when the package is malformed.
        """
        return _Session(artifact)


class _Session(Session):
    def __init__(self, artifact: Path) -> None:
        import coremltools as ct

        from dkm_exporters.coreml.package import Package

        package = Package(artifact)
        self.numeric_class = NumericClass.FP16 if package.float16 else NumericClass.FP32
        self._outputs = package.outputs
        self._model = ct.models.MLModel(str(artifact), compute_units=ct.ComputeUnit.ALL)

    def run(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        # Core ML has no int64.
        given = {
            name: array.astype(np.int32) if array.dtype == np.int64 else array
            for name, array in inputs.items()
        }
        results = self._model.predict(given)
        return [np.asarray(results[name]) for name in self._outputs]
