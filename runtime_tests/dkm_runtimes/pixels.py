"""Image inputs of a Core ML package, which makes the model's input from pixels by itself."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from dkm_export.errors import Unsupported
from dkm_exporters.coreml.options import IMAGES_KEY, ImageInput
from dkm_exporters.mlprogram.package import Package

_TOLERANCE: Final = 1e-3
"""Of a pixel. Normalizing in float32 and back is off by less than a tenth of it."""


_IMAGES: Final = TypeAdapter(dict[str, ImageInput])


def image_inputs(package: Package) -> dict[str, ImageInput]:
    """The inputs of ``package`` that take an image, by name.

    Raises:
        InvalidInput: when its metadata do not describe them.
    """
    try:
        images = _IMAGES.validate_json(package.metadata.get(IMAGES_KEY, "{}"))
    except ValidationError as error:
        raise package.invalid(f"the metadata '{IMAGES_KEY}' is malformed") from error
    for name, image in images.items():
        given = package.inputs.get(name)
        shape = given.shape if given and given.shape else ()
        if len(shape) != 4 or shape[:2] != (1, image.channels):
            raise package.invalid(f"the metadata '{IMAGES_KEY}' does not fit the input '{name}'")
    return images


def pixels(x: npt.NDArray[Any], image: ImageInput) -> npt.NDArray[np.float64]:
    """The pixels that ``image`` makes ``x`` of, not rounded, in the shape and channels of ``x``.

    Args:
        x: ``[..., channels, height, width]``, an input of the model.
        image: how the package makes it.
    """
    scale, bias = (np.array(value).reshape(-1, 1, 1) for value in (image.scale, image.bias))
    values: npt.NDArray[np.float64] = (x.astype(np.float64) - bias) / scale
    return values


def picture(name: str, x: npt.NDArray[Any], image: ImageInput) -> npt.NDArray[np.uint8]:
    """The 8-bit image that gives ``x``.

    Args:
        name: of the input, for the error.
        x: float32 ``[1, channels, height, width]``, an input of the model.
        image: how the package makes it.

    Returns:
        uint8 ``[height, width, 3]`` in red, green, blue, or ``[height, width]`` of grey.

    Raises:
        Unsupported: when there is none.
    """
    (values,) = pixels(x, image)
    rounded = values.round()
    exact = np.abs(values - rounded) <= _TOLERANCE
    if not (exact & (rounded >= 0) & (rounded <= 255)).all():
        raise Unsupported(
            f"input '{name}' of a sample is not an 8-bit image, which is what the package takes: "
            "compress with a task whose inputs are normalized images"
        )
    channels = rounded.astype(np.uint8)
    if image.color_layout == "GRAYSCALE":
        grey: npt.NDArray[np.uint8] = channels[0]
        return grey
    return np.moveaxis(channels if image.color_layout == "RGB" else channels[::-1], 0, -1)
