"""Settings of the ONNX target, and what of them a model cannot have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StringConstraints

from dkm_export.errors import InvalidInput
from dkm_export.spec import Frozen

if TYPE_CHECKING:
    from dkm_export.palettized import ModelSource

Axis = Annotated[int, Field(ge=0, le=7)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=100)]


def data_file(artifact: Path) -> Path:
    """Where the tensors of an ``.onnx`` file are that are too many for protobuf."""
    return artifact.with_name(f"{artifact.name}.data")


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

    opset: Annotated[int, Field(ge=15, le=25)] = 18
    functions: bool = False
    side_data: Literal["fp32", "fp16"] = "fp32"
    dynamic_axes: dict[str, dict[Axis, Name]] = Field(default_factory=dict)

    def require_fit(self, source: ModelSource, target: str) -> None:
        """Refuse axes that the model does not have.

        Raises:
            InvalidInput: with the input, the axis and what is allowed.
        """
        for problem in self._problems(source):
            raise InvalidInput(f"{target}: dynamic_axes: {problem}")

    def _problems(self, source: ModelSource) -> Iterator[str]:
        inputs = {spec.name: spec for spec in source.inputs}
        sizes: dict[str, int] = {}
        for name, axes in self.dynamic_axes.items():
            if name not in inputs:
                yield f"no input '{name}', the model has: {', '.join(inputs)}"
                continue
            shape = inputs[name].shape
            for axis, label in axes.items():
                if axis >= len(shape):
                    yield f"'{name}' has no axis {axis}, allowed: 0 to {len(shape) - 1}"
                elif sizes.setdefault(label, shape[axis]) != shape[axis]:
                    yield (
                        f"axis {axis} of '{name}' is called '{label}' and has size {shape[axis]}, "
                        f"another '{label}' has {sizes[label]}: name them apart"
                    )
