"""Palettes as operations of a program that coremltools builds."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

from dkm_export.palette import Palette

SUFFIXES: Final = {"fp16": "_cast_fp16", "fp32": ""}
"""What coremltools appends to the name of an operation that it casts to the precision."""

REMOVED_PASSES: Final = {
    # It merges LUTs that differ by less than 6e-8, as some float16 values and 0 and -0 do.
    "common::const_deduplication",
    # It moves the scale of an int8 LUT, and fails where there are vectors.
    "common::canonicalize_quantized_lut_pattern",
}


def lut_to_dense(palette: Palette, lut: Any, **place: Any) -> Any:
    """A ``constexpr_lut_to_dense`` of iOS 18.

    Args:
        palette: gives the indices.
        lut: its table, shaped by `ios18_shape`.
        place: name of the operation, and where it goes.
    """
    index_type = types.nptype_from_builtin(types.string_to_builtin(f"uint{palette.bits}"))
    return mb.constexpr_lut_to_dense(
        indices=palette.indices.astype(index_type),
        lut=lut,
        # The form that coremltools itself writes: single values have no axis.
        vector_axis=np.int32(palette.layout.axis) if palette.layout.dim > 1 else None,
        **place,
    )


def float_lut(palette: Palette) -> npt.NDArray[np.float32]:
    """The LUT as iOS 18 has it.

    The graph is float32 until the float16 pass, which takes the LUT back exactly.
    """
    return palette.lut.reshape(ios18_shape(palette)).astype(np.float32)


def ios18_shape(palette: Palette) -> tuple[int, ...]:
    """One table for each group, of the rank of the weight and two more."""
    layout = palette.layout
    return (layout.groups, *[1] * (len(layout.shape) - 1), 1 << palette.bits, layout.dim)
