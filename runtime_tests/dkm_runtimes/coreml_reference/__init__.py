"""A stand-in for Core ML where there is none: the saved program, interpreted with torch."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy.typing as npt

from dkm_export.checking.runtime import Arrays, Runtime

if TYPE_CHECKING:
    from dkm_runtimes.coreml_reference.interpreter import ReferenceSession


class CoreMLReferenceRuntime(Runtime):
    """Interprets a package in float32: it proves graph, weights and indices, not Apple's numerics.

    Float16 constants are the values in the file, but activations are not rounded to float16.

    Attributes:
        rounding: whether activations are.
    """

    name = "coreml-reference"
    target = "coreml"
    where = "interpreted with torch on CPU; not Core ML"
    packages = ("coremltools",)
    rounding: ClassVar[bool] = False

    def reported_version(self) -> str:
        """Of torch, which computes what our interpreter asks for."""
        return f"torch {metadata.version('torch')}"

    def load(self, artifact: Path) -> ReferenceSession:
        """Read and decode a package.

        Raises:
            Unsupported: for an operator that is not in the table, with its output's name and
                place; with rounding, for a program that has no float16.
            InvalidInput: when the package is malformed.
        """
        from dkm_runtimes.coreml_reference.interpreter import ReferenceSession

        return ReferenceSession(artifact, rounding=self.rounding)

    def intermediates(self, artifact: Path, inputs: Arrays) -> list[tuple[str, npt.NDArray[Any]]]:
        """What every operation of the program gives.

        Raises:
            Unsupported, InvalidInput: as `load` and the session do.
        """
        return self.load(artifact).intermediates(inputs)


class CoreMLReferenceFp16Runtime(CoreMLReferenceRuntime):
    """The same, but every result that the program declares as float16 is rounded to float16.

    It sees ranges and roundings that float16 does not have; Core ML's order of summation and wider
    accumulators, which differ by device, it does not see.
    """

    name = "coreml-reference-fp16"
    where = (
        "interpreted with torch on CPU, activations rounded to float16 after each operation; "
        "not Core ML"
    )
    rounding = True
