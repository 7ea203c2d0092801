"""Settings of the ONNX target."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from dkm_export.spec import Frozen

Axis = Annotated[int, Field(ge=0, le=7)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=100)]


class OnnxOptions(Frozen):
    """Settings of the target.

    Attributes:
        opset: version of the standard operators. The IR version is the oldest that goes with it.
        functions: write each decoder as one call of a model-local function of the domain
            ``dkm.lut``, which runtimes inline, instead of its operators.
        side_data: type in which biases, norms, scales and weights without a palette are stored;
            they are computed with in float32 either way.
        dynamic_axes: by input, names of the axes whose size the app chooses. Axes with the same
            name have the same size.
    """

    opset: Annotated[int, Field(ge=13, le=25)] = 18
    functions: bool = False
    side_data: Literal["fp32", "fp16"] = "fp32"
    dynamic_axes: dict[str, dict[Axis, Name]] = Field(default_factory=dict)
