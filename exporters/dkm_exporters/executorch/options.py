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
        coreml_precision: what Core ML computes in; the Neural Engine has fp16 only. Inputs and
            outputs are float32 either way.
        max_batch: the most samples that the app may give at once, on axis 0 of every input; None
            fixes the size to that of the model's source.
    """

    backend: Backend = "xnnpack-lut"
    coreml_precision: Precision = "fp16"
    max_batch: Annotated[int, Field(ge=2, le=65536)] | None = None

    @field_validator("coreml_precision")
    @classmethod
    def _of_coreml(cls, value: Precision, info: ValidationInfo) -> Precision:
        backend = info.data.get("backend", "coreml")
        if backend != "coreml":
            raise ValueError(f"not for backend={backend}: leave it out, or set backend=coreml")
        return value
