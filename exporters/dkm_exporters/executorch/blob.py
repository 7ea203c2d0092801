"""A palettized weight in the memory order that a consumer wants: what the native code expands.

`native/lut_blob.h` defines the format. Indices lie in the order of the weights they stand for, so
that expanding is one pass over both.
"""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Final

import numpy as np
import numpy.typing as npt

from dkm_export.entry import PaletteEntry
from dkm_export.errors import InvalidInput
from dkm_export.palette import (
    MAX_BITS,
    MAX_DIM,
    Layout,
    Palette,
    lut_size,
    pack,
    packed_size,
    unpack,
)

_MAGIC: Final = b"DKM-LUT\0"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sIBBH8Q")

_Order = tuple[int, ...]

_ORDERS: Final[dict[int, list[_Order]]] = {
    1: [(0,)],
    2: [(0, 1), (1, 0)],
    3: [(0, 2, 1), (1, 2, 0), (0, 1, 2)],
    4: [(0, 2, 3, 1), (1, 2, 3, 0), (0, 1, 2, 3)],
    5: [(0, 1, 2, 3, 4)],
}
"""By the number of axes, the orders in which XNNPACK may want those of a weight.

A convolution's are output, height, width, input; a depthwise or transposed one's start with axis 1.
"""


def weight_keys(palette: Palette) -> dict[str, _Order]:
    """The order of axes by the key of the weight in it: what XNNPACK's lowering calls the data."""
    dense = palette.dense()
    return {_key(dense, order): order for order in _ORDERS[dense.ndim]}


def write_blob(palette: Palette, order: _Order) -> bytes:
    """The palette of a weight, with its scale, for the axes of the weight in ``order``."""
    indices = np.ascontiguousarray(palette.indices.transpose(order))
    scale = b"" if palette.scale is None else palette.scale.tobytes()
    packed = pack(indices, palette.bits).tobytes()
    return b"".join((_header(palette, order), palette.lut.tobytes(), scale, packed))


def read_blob(blob: bytes, key: str, entry: PaletteEntry) -> Palette:
    """The palette of a blob, whose expanded weight has to have the key.

    Args:
        blob: as `write_blob` made it.
        key: what the program calls the weight.
        entry: bits and layout.

    Raises:
        InvalidInput: when blob, key and entry do not fit each other.
    """
    layout = entry.layout
    for order in _ORDERS.get(len(layout.shape), []):
        palette = _read(blob, entry.bits, layout, order)
        if palette is not None and _key(palette.dense(), order) == key:
            return palette
    raise InvalidInput("the packed weight is not what the program calls it")


def expanded_size(blob: bytes) -> int:
    """Bytes of the weight that a blob expands to.

    Raises:
        InvalidInput: when the blob is malformed.
    """
    outer, size, inner = _fields(blob)[2:5]
    return 4 * outer * size * inner


def expand_blob(blob: bytes) -> npt.NDArray[np.float32]:
    """The weight in the order that its consumer wants, flat: what the native code computes.

    Raises:
        InvalidInput: when the blob is malformed.
    """
    bits, dim, outer, size, inner, groups, group_stride, scales, scale_stride = _fields(blob)
    along = -(-size // dim)
    luts, packed = 2 * groups * dim << bits, packed_size(outer * along * inner, bits)
    lut = np.frombuffer(blob, np.float16, luts // 2, _HEADER.size).astype(np.float32)
    codes = unpack(
        np.frombuffer(blob, np.uint8, packed, len(blob) - packed), bits, outer * along * inner
    )
    element = np.arange(outer * size * inner).reshape(outer, size, inner)
    group = element[:, ::dim] // group_stride % groups
    vectors = lut.reshape(groups, -1, dim)[group, codes.reshape(group.shape)]
    padded = np.moveaxis(vectors, 3, 2).reshape(outer, along * dim, inner)
    weight = np.ascontiguousarray(padded[:, :size])
    if scales:
        scale = np.frombuffer(blob, np.float32, scales, _HEADER.size + luts)
        weight *= scale[element // max(scale_stride, 1) % scales]
    return weight.reshape(-1)


def _fields(blob: bytes) -> tuple[int, ...]:
    """Bits, dim and the sizes of a header that is as the blob's length says.

    So a weight has at most 2048 times as many bytes as its blob, whatever the header says.
    """
    if len(blob) < _HEADER.size or not blob.startswith(_MAGIC):
        raise InvalidInput("not a packed weight")
    _, version, bits, dim, _, *sizes, _ = _HEADER.unpack_from(blob)
    if version != _VERSION or not 1 <= bits <= MAX_BITS or not 1 <= dim <= MAX_DIM:
        raise InvalidInput("the header of the packed weight is malformed")
    outer, size, inner, groups, group_stride, scales, _ = sizes
    if 0 in (outer, size, inner, groups, group_stride):
        raise InvalidInput("the header of the packed weight is malformed")
    packed = packed_size(outer * -(-size // dim) * inner, bits)
    if len(blob) != _HEADER.size + (2 * groups * dim << bits) + 4 * scales + packed:
        raise InvalidInput("the packed weight is of another size than its header says")
    return bits, dim, *sizes


def _key(dense: npt.NDArray[np.float32], order: _Order) -> str:
    return hashlib.sha256(np.ascontiguousarray(dense.transpose(order)).data).hexdigest()


def _header(palette: Palette, order: _Order) -> bytes:
    layout = palette.layout
    shape = [layout.shape[axis] for axis in order]

    def after(axis: int) -> int:
        return math.prod(shape[order.index(axis) + 1 :])

    size = layout.shape[layout.axis]
    inner = after(layout.axis)
    group_stride = layout.shape[0] // layout.groups * after(0)
    scales, scale_stride = 0, 1
    if palette.scale is not None:
        scales, scale_stride = palette.scale.size, after(_scale_axis(palette))
    return _HEADER.pack(
        *(_MAGIC, _VERSION, palette.bits, layout.dim, 0),
        *(layout.size // (size * inner), size, inner),
        *(layout.groups, group_stride, scales, scale_stride, 0),
    )


def _scale_axis(palette: Palette) -> int:
    """The axis of the output channels."""
    assert palette.scale is not None
    sizes = palette.scale.shape
    return max(range(len(sizes)), key=lambda axis: sizes[axis])


def _read(blob: bytes, bits: int, layout: Layout, order: _Order) -> Palette | None:
    """The palette, or None when the blob is none of this layout in this order."""
    luts, packed = lut_size(layout, bits), packed_size(layout.vectors, bits)
    scales, rest = divmod(len(blob) - _HEADER.size - luts - packed, 4)
    if scales < 0 or rest:
        return None
    lut = np.frombuffer(blob, np.float16, luts // 2, _HEADER.size)
    codes = unpack(np.frombuffer(blob, np.uint8, packed, len(blob) - packed), bits, layout.vectors)
    index_shape = [layout.index_shape[axis] for axis in order]
    indices = codes.reshape(index_shape).transpose(np.argsort(order))
    for axis in range(len(layout.shape)) if scales else (None,):
        scale = None
        if axis is not None:
            if scales != layout.shape[axis]:
                continue
            broadcast = [scales if other == axis else 1 for other in range(len(layout.shape))]
            values = np.frombuffer(blob, np.float32, scales, _HEADER.size + luts)
            scale = values.reshape(broadcast).copy()
        palette = Palette(
            bits,
            layout,
            lut.reshape(layout.groups, -1, layout.dim).copy(),
            np.ascontiguousarray(indices),
            scale,
        )
        if blob.startswith(_header(palette, order)):
            return palette
    return None
