"""Settings of the ExecuTorch target."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from dkm_export.spec import Frozen

Backend = Literal["xnnpack-lut", "portable", "coreml"]
"""Who decodes the weights, and who computes with them."""

Precision = Literal["fp16", "fp32"]


class ExecuTorchOptions(Frozen):
    """Settings of the target.

    Attributes:
        backend: ``xnnpack-lut``, XNNPACK with weights that our delegate decodes when it loads the
            program; ``portable``, stock kernels that decode them at each inference; ``coreml``,
            ExecuTorch's Core ML delegate, for iOS 18, macOS 15 and later.
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
