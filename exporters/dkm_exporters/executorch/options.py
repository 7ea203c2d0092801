"""Settings of the ExecuTorch target."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, ValidationInfo, field_validator

from dkm_export.spec import Frozen

Backend = Literal["xnnpack-lut", "xnnpack-ptd", "xnnpack-init", "portable", "coreml"]
"""Who decodes the weights, and who computes with them."""

Precision = Literal["fp16", "fp32"]

LINKS: Final[dict[Backend, str]] = {
    "xnnpack-lut": "the app links XNNPACK and our delegate (docs/executorch.md), or the program "
    "does not load",
    "xnnpack-ptd": "the app links XNNPACK, and makes the .ptd file out of the .lut file once, with "
    "dkm_expand or lut_weights.h",
    "xnnpack-init": "the app links XNNPACK and portable kernels, and executes the method init "
    "before forward, on one Module with share_memory_arenas",
    "portable": "the app links portable kernels; each inference decodes all weights, which is slow",
    "coreml": "the app links ExecuTorch's Core ML delegate, and runs on iOS 18, macOS 15 or later",
}
"""What the app needs, by backend."""

WEIGHTS_SUFFIX: Final = ".lut"
"""Of the file with packed weights that ``xnnpack-ptd`` puts beside the program."""


class ExecuTorchOptions(Frozen):
    """Settings of the target.

    Attributes:
        backend: ``xnnpack-lut``, XNNPACK with weights that our delegate decodes when it loads the
            program; ``xnnpack-ptd``, XNNPACK with weights from a ``.ptd`` file that the app expands
            once; ``xnnpack-init``, XNNPACK with weights that stock kernels decode in a method that
            the app runs first; ``portable``, stock kernels that decode weights at each inference;
            ``coreml``, ExecuTorch's Core ML delegate, for iOS 18, macOS 15 and later.
        precision: what the backend computes in; inputs and outputs are float32 either way. None is
            fp16 for Core ML, whose Neural Engine has nothing else, and fp32 for the others.
        max_batch: the most samples that the app may give at once, on axis 0 of every input; None
            fixes the size to that of the model's source.
    """

    backend: Backend = "xnnpack-lut"
    precision: Precision | None = None
    max_batch: Annotated[int, Field(ge=2, le=65536)] | None = None

    @field_validator("precision")
    @classmethod
    def _of_backend(cls, value: Precision | None, info: ValidationInfo) -> Precision | None:
        if value == "fp16" and info.data.get("backend") == "xnnpack-init":
            raise ValueError(
                "fp16 is not for backend=xnnpack-init: leave it out, or set backend=xnnpack-lut"
            )
        return value

    @property
    def computes_in(self) -> Precision:
        """The precision, by default the backend's."""
        return self.precision or ("fp16" if self.backend == "coreml" else "fp32")
