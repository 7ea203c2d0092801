"""Core ML itself, on a Mac: a runtime for each choice of compute units."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from dkm_export.checking.metrics import Limits
from dkm_export.checking.runtime import Arrays, NumericClass, Runtime, Session
from dkm_export.errors import Unsupported
from dkm_export.plugins import missing_packages

if TYPE_CHECKING:
    from dkm_exporters.mlprogram.package import Package


class CoreMLRuntime(Runtime):
    """``MLModel.predict`` on all compute units, which is what an app gets by default.

    Attributes:
        units: name of the ``coremltools.ComputeUnit``. It is what Core ML may use: which of them
            computes an operation is up to Core ML.
    """

    name = "coreml"
    target = "coreml"
    where = "Core ML on a Mac, any unit"
    packages = ("coremltools",)
    units: ClassVar[str] = "ALL"

    def unavailable(self) -> str | None:
        """Why this runtime cannot run here, or None."""
        if platform.system() != "Darwin":
            return "Core ML runs only on macOS"
        return super().unavailable()

    def reported_version(self) -> str:
        """Of macOS, which Core ML is a part of."""
        return f"macOS {platform.mac_ver()[0]}, {super().reported_version()}"

    def load(self, artifact: Path) -> Session:
        """Compile and load a package.

        Raises:
            Unsupported: when the package holds something other than an ML program, or takes images
                and pillow is not installed.
            InvalidInput: when the package is malformed.
        """
        return _Session(artifact, self.units)

    def device_test(
        self,
        artifact: Path,
        inputs: Arrays,
        outputs: Arrays,
        limits: Mapping[NumericClass, Limits],
    ) -> dict[str, bytes]:
        """An XCTest of all compute units with its samples, and how to add it to an app.

        Raises:
            Unsupported: when the package takes an image and a sample is not an 8-bit one, or
                coremltools, which reads the package, is not installed.
            InvalidInput: when the package is malformed.
        """
        if missing := missing_packages(self.packages, self.target):
            raise Unsupported(missing)
        from dkm_exporters.mlprogram.package import Package
        from dkm_runtimes.coreml_device import device_test

        package = Package(artifact)
        numeric_class = _numeric_class(package)
        return device_test(package, numeric_class, inputs, outputs, limits[numeric_class])


class CoreMLCPURuntime(CoreMLRuntime):
    """``MLModel.predict`` on the CPU."""

    name = "coreml-cpu"
    where = "Core ML on a Mac, CPU only"
    units = "CPU_ONLY"


class CoreMLGPURuntime(CoreMLRuntime):
    """``MLModel.predict`` on GPU and CPU."""

    name = "coreml-gpu"
    where = "Core ML on a Mac, CPU and GPU"
    units = "CPU_AND_GPU"


class CoreMLNeuralEngineRuntime(CoreMLRuntime):
    """``MLModel.predict`` on the Neural Engine and the CPU; a Mac without one uses the CPU."""

    name = "coreml-ne"
    where = "Core ML on a Mac, CPU and Neural Engine"
    units = "CPU_AND_NE"


def _numeric_class(package: Package) -> NumericClass:
    return NumericClass.FP16 if package.float16 else NumericClass.FP32


class _Session(Session):
    def __init__(self, artifact: Path, units: str) -> None:
        import coremltools as ct

        from dkm_exporters.mlprogram.package import Package
        from dkm_runtimes.pixels import image_inputs

        package = Package(artifact)
        self.numeric_class = _numeric_class(package)
        self._outputs = package.outputs
        self._images = image_inputs(package)
        if self._images and (missing := missing_packages(("PIL",), "models")):
            raise Unsupported(missing)
        self._model = ct.models.MLModel(str(artifact), compute_units=ct.ComputeUnit[units])

    def run(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        """Predict.

        Returns:
            The outputs in the model's order.

        Raises:
            Unsupported: when the package takes an image and the input is not an 8-bit one.
        """
        results = self._model.predict({name: self._given(name, x) for name, x in inputs.items()})
        return [np.asarray(results[name]) for name in self._outputs]

    def _given(self, name: str, x: npt.NDArray[Any]) -> Any:
        """What Core ML takes for an input: an image, or an array, of which none is int64."""
        if name not in self._images:
            return x.astype(np.int32) if x.dtype == np.int64 else x
        from PIL import Image

        from dkm_runtimes.pixels import picture

        return Image.fromarray(picture(name, x, self._images[name]))
