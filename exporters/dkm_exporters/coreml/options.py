"""Settings of the Core ML target, and what of them a deployment target or a model cannot have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dkm_export.errors import InvalidInput
from dkm_export.exporting import Capabilities
from dkm_export.spec import Frozen
from dkm_exporters.mlprogram import PALETTES

if TYPE_CHECKING:
    from dkm_export.palettized import InputSpec, ModelSource

DeploymentTarget = Literal["iOS15", "iOS16", "iOS17", "iOS18", "iOS26"]

FULL: Final = PALETTES
"""Of iOS 18 and later: vectors, groups of channels, 3 bits, int8 LUTs."""

_SCALAR: Final = Capabilities(bits=(1, 2, 4, 6, 8), max_dim=1, groups=False)
"""Of iOS 16 and 17: single weights, one LUT for the whole weight."""

_CAPABILITIES: Final[dict[DeploymentTarget, Capabilities | None]] = {
    "iOS15": None,
    "iOS16": _SCALAR,
    "iOS17": _SCALAR,
    "iOS18": FULL,
    "iOS26": FULL,
}

_CHANNELS: Final = {"RGB": 3, "BGR": 3, "GRAYSCALE": 1}

IMAGES_KEY: Final = "dkm_export.images"
"""User-defined metadata of a package: JSON of `ImageInput` by the name of the input."""

Size = Annotated[int, Field(ge=1, lt=2**31)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Line = Annotated[str, Field(min_length=1, pattern=r"^[^\n]*$")]


def _read_labels(value: object) -> object:
    """Take a path for the labels in that file, one in each line."""
    if not isinstance(value, str | Path):
        return value
    try:
        return tuple(Path(value).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise ValueError(f"{value}: {reason}: name a file with one label in each line") from error


def _require_text(value: object) -> object:
    """Refuse what the command line took for a number: of a version 1.10, 1.1 would be left."""
    if not isinstance(value, str):
        raise ValueError(f"{value} is no text: put quotes around it, as in '\"{value}\"'")
    return value


Text = Annotated[str, BeforeValidator(_require_text)]


class ImageInput(Frozen):
    """An input that the app gives as an image; the model's input is ``scale * pixel + bias``.

    Attributes:
        color_layout: order of the model's channels.
        scale: for pixels of 0 to 255, one number or one for each channel.
        bias: one number or one for each channel, in units of the model's input.
    """

    color_layout: Literal["RGB", "BGR", "GRAYSCALE"] = "RGB"
    scale: Factor | tuple[Factor, ...] = 1 / 255
    bias: Number | tuple[Number, ...] = 0.0

    @model_validator(mode="after")
    def _one_for_each_channel(self) -> Self:
        for key, value in (("scale", self.scale), ("bias", self.bias)):
            if isinstance(value, tuple) and len(value) != self.channels:
                raise ValueError(
                    f"{key} has {len(value)} values, {self.color_layout} has {self.channels} "
                    "channels: give one value or one for each"
                )
        return self

    @property
    def channels(self) -> int:
        """How many channels the image has."""
        return _CHANNELS[self.color_layout]


class CoreMLOptions(Frozen):
    """Settings of the target.

    Attributes:
        precision: of activations, LUTs and dense weights. The Neural Engine computes fp16 only;
            inputs and outputs are float32 (or int32) either way.
        deployment_target: the oldest system that loads the package; iOS 16 stands for macOS 13 and
            so on. Older ones hold fewer palettes.
        lut: how LUTs are stored: in the precision, or as int8 with a scale, for palettes that a
            rule with ``lut = "int8"`` made.
        images: inputs that the app gives as images, by name.
        class_labels: of the first output, in order, or a file with one in each line. The package
            then is a classifier: ``classLabel`` and ``classLabel_probs`` stand beside the outputs.
        softmax: whether the first output is logits, whose softmax are the probabilities.
        enumerated_shapes: shapes that an input may have, by name; one of them is the recipe's.
        shape_ranges: by input, for each axis its size or ``[least, most]``.
        author: shown by Xcode, as are the next three.
        license: of the model.
        version: of the model.
        description: of the model.
    """

    precision: Literal["fp16", "fp32"] = "fp16"
    deployment_target: DeploymentTarget = "iOS18"
    lut: Literal["float", "int8"] = "float"
    images: dict[str, ImageInput] = Field(default_factory=dict)
    class_labels: Annotated[tuple[Line, ...], BeforeValidator(_read_labels)] = ()
    softmax: bool = True
    enumerated_shapes: dict[str, tuple[tuple[Size, ...], ...]] = Field(default_factory=dict)
    shape_ranges: dict[str, tuple[Size | tuple[Size, Size], ...]] = Field(default_factory=dict)
    author: Text = ""
    license: Text = ""
    version: Text = ""
    description: Text = ""

    @property
    def capabilities(self) -> Capabilities | None:
        """The palettes that the deployment target can hold, or None where it can hold none."""
        return _CAPABILITIES[self.deployment_target]

    def sizes(self, spec: InputSpec) -> list[tuple[int, ...]]:
        """For each axis of an input, the sizes that it may have; two of them are a range."""
        if spec.name in self.enumerated_shapes:
            return [
                tuple(dict.fromkeys(n))
                for n in zip(*self.enumerated_shapes[spec.name], strict=True)
            ]
        if spec.name in self.shape_ranges:
            return [(n,) if isinstance(n, int) else n for n in self.shape_ranges[spec.name]]
        return [(size,) for size in spec.shape]

    def require_fit(self, source: ModelSource) -> None:
        """Refuse what the model does not have.

        Raises:
            InvalidInput: with the option, the value and what is allowed.
        """
        for problem in self._problems(source):
            raise InvalidInput(f"coreml: {problem}")

    def _problems(self, source: ModelSource) -> Iterator[str]:
        inputs = {spec.name: spec for spec in source.inputs}
        for option in ("images", "enumerated_shapes", "shape_ranges"):
            for name in getattr(self, option):
                if name not in inputs:
                    yield f"{option}: no input '{name}', the model has: {', '.join(inputs)}"
        for name, image in self.images.items():
            yield from _image_problems(inputs[name], image)
        if twice := self.enumerated_shapes.keys() & self.shape_ranges.keys():
            yield f"input '{min(twice)}' has both enumerated_shapes and shape_ranges: give one"
        for name, shapes in self.enumerated_shapes.items():
            yield from _enumeration_problems(inputs[name], shapes)
        for name, ranges in self.shape_ranges.items():
            yield from _range_problems(inputs[name], ranges)
        if len(self.enumerated_shapes) > 1 and self.deployment_target in (
            "iOS15",
            "iOS16",
            "iOS17",
        ):
            yield (
                f"{self.deployment_target} has enumerated shapes of one input only: "
                "set deployment_target=iOS18, or give the others shape_ranges"
            )
        if len(set(self.class_labels)) < len(self.class_labels):
            yield "class_labels: a label is there twice"
        if self.class_labels and source.inputs[0].shape[0] != 1:
            yield "class_labels: a classifier takes one example at a time: make the batch 1"


def _image_problems(spec: InputSpec, image: ImageInput) -> Iterator[str]:
    expected = f"[1, {image.channels}, height, width]"
    shape = list(spec.shape)
    if spec.dtype != "float32" or len(shape) != 4 or shape[:2] != [1, image.channels]:
        yield (
            f"images: input '{spec.name}' is {spec.dtype} {shape}, "
            f"a {image.color_layout} image is float32 {expected}"
        )


def _enumeration_problems(spec: InputSpec, shapes: tuple[tuple[int, ...], ...]) -> Iterator[str]:
    if any(len(shape) != len(spec.shape) for shape in shapes) or spec.shape not in shapes:
        yield (
            f"enumerated_shapes: the shapes of '{spec.name}' have {len(spec.shape)} axes and "
            f"{list(spec.shape)}, that of the recipe, is one of them"
        )


def _range_problems(spec: InputSpec, ranges: Iterable[int | tuple[int, int]]) -> Iterator[str]:
    bounds = [(n, n) if isinstance(n, int) else n for n in ranges]
    if len(bounds) != len(spec.shape) or not all(
        low <= size <= high for size, (low, high) in zip(spec.shape, bounds, strict=False)
    ):
        yield (
            f"shape_ranges: '{spec.name}' needs a size or [least, most] for each of its axes, "
            f"with {list(spec.shape)}, the shape of the recipe, among them"
        )
