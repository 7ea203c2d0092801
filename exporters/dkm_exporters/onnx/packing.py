"""How indices lie in an ``.onnx`` file.

Looking up several vectors at once takes a fraction of the operators' time and memory. So a few
indices that follow one another make one number, and it is numbers that `pack_fields` packs. For 1,
2, 4 and 8 bits a number is a byte, and the packing that of `dkm_export.palette.pack`. Where rows of
a weight are looked up, an index is a number, and the bytes have two axes: each row of indices is
packed by itself if it fills whole bytes, or else all are one row. Where a weight is used transposed
only, so are its indices.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dkm_export.fields import fields, pack_fields, unpack_fields
from dkm_export.palette import Layout, Palette, packed_size

_JOINED: Final = {1: 8, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 7: 2, 8: 1}
"""By bits, how many indices make a number: of 8, 10, 12 or 14 bits."""


def joined(bits: int, layout: Layout) -> int:
    """How many indices make a number, where rows are not looked up.

    One, unless numbers come out even, and are not more than the bytes that the indices take: a LUT
    of all of them has to be made for each weight.
    """
    count = _JOINED[bits]
    even = layout.vectors // layout.groups % count == 0
    entries = layout.groups << (bits * count)
    return count if even and entries <= packed_size(layout.vectors, bits) else 1


def rows_fill_bytes(bits: int, layout: Layout) -> bool:
    """Whether each field of a row of indices, of a weight with two axes, fills whole bytes."""
    return all(layout.index_shape[1] * field.width % 8 == 0 for field in fields(bits))


def pack_indices(
    indices: npt.NDArray[np.uint8], bits: int, layout: Layout, *, looked_up: bool
) -> npt.NDArray[np.uint8]:
    """Pack into exactly ``ceil(n * bits / 8)`` bytes, ``[rows, ...]`` where rows are looked up."""
    if looked_up:
        rows = layout.index_shape[0] if rows_fill_bytes(bits, layout) else 1
        return pack_fields(indices.reshape(rows, -1), bits)
    count = joined(bits, layout)
    parts = indices.reshape(-1, count).astype(np.uint16) << _shifts(bits, count)
    return pack_fields(np.bitwise_or.reduce(parts, axis=1), bits * count)


def unpack_indices(
    packed: npt.NDArray[np.uint8], bits: int, layout: Layout
) -> npt.NDArray[np.uint8]:
    """Inverse of `pack_indices`: uint8 of ``layout.index_shape``."""
    codes: npt.NDArray[Any]
    if packed.ndim == 2:
        codes = unpack_fields(packed, bits, layout.vectors // len(packed))
        return codes.reshape(layout.index_shape)
    count = joined(bits, layout)
    numbers = unpack_fields(packed, bits * count, layout.vectors // count)
    codes = numbers[:, None] >> _shifts(bits, count) & ((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(layout.index_shape)


def transposed(palette: Palette) -> Palette:
    """The palette of the transposed weight, which has two axes and one LUT; its own inverse."""
    layout = palette.layout
    return Palette(
        palette.bits,
        Layout((layout.shape[1], layout.shape[0]), layout.dim, 1 - layout.axis),
        palette.lut,
        np.ascontiguousarray(palette.indices.T),
        None if palette.scale is None else np.ascontiguousarray(palette.scale.T),
    )


def _shifts(bits: int, count: int) -> npt.NDArray[np.uint16]:
    return np.arange(count, dtype=np.uint16) * np.uint16(bits)
