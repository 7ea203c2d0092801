"""Settings of the ExecuTorch target."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dkm_export.spec import Frozen

Backend = Literal["xnnpack-lut", "xnnpack-init", "portable"]
"""Who decodes the weights, and who computes with them."""


class ExecuTorchOptions(Frozen):
    """Settings of the target.

    Attributes:
        backend: ``xnnpack-lut``, XNNPACK with weights that our delegate decodes when it loads the
            program; ``xnnpack-init``, the stock XNNPACK with weights that stock kernels decode
            once, in a method that the app runs first; ``portable``, stock kernels that decode them
            at each inference.
        max_batch: the most samples that the app may give at once, on axis 0 of every input; None
            fixes the size to that of the model's source.
    """

    backend: Backend = "xnnpack-lut"
    max_batch: Annotated[int, Field(ge=2, le=65536)] | None = None
