"""A stand-in for Core ML where there is none: the saved program, interpreted with torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dkm_export.checking.runtime import Runtime

if TYPE_CHECKING:
    from dkm_runtimes.coreml_reference.interpreter import ReferenceSession


class CoreMLReferenceRuntime(Runtime):
    """Interprets a package in float32: it proves graph, weights and indices, not Apple's numerics.

    Float16 constants are the values in the file, but activations are not rounded to float16.
    """

    name = "coreml-reference"
    target = "coreml"
    where = "interpreted with torch on CPU; not Core ML"
    packages = ("coremltools",)

    def load(self, artifact: Path) -> ReferenceSession:
        """Read and decode a package.

        Raises:
            Unsupported: for an operator that is not in the table, with its output's name.
            InvalidInput: when the package is malformed.
        """
        from dkm_runtimes.coreml_reference.interpreter import ReferenceSession

        return ReferenceSession(artifact)
