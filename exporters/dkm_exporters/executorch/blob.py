"""A palettized weight in the memory order that a consumer wants: what the native code expands.

`native/lut_blob.h` defines the format. Indices lie in the order of the weights they stand for, so
that expanding is one pass over both.
"""

from __future__ import annotations

import hashlib
import math
import struct
from enum import IntEnum
from itertools import product
from typing import Any, Final

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
from dkm_exporters.executorch.options import Precision

_MAGIC: Final = b"DKM-LUT\0"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sIBBH8Q")
_ELEMENT_FIELD: Final = slice(14, 16)


class _Element(IntEnum):
    """What a weight consists of, as the header of its blob says."""

    FLOAT32 = 0
    FLOAT16 = 1
    ROUNDED = 2
    """float32, rounded to the nearest float16."""

    @property
    def size(self) -> int:
        """In bytes."""
        return 2 if self is _Element.FLOAT16 else 4

    def of(self, dense: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """A weight of such elements."""
        if self is _Element.FLOAT32:
            return dense
        with np.errstate(over="ignore"):
            halves = dense.astype(np.float16)
        return halves if self is _Element.FLOAT16 else halves.astype(np.float32)


_ELEMENTS: Final[dict[Precision, tuple[_Element, ...]]] = {
    "fp32": (_Element.FLOAT32,),
    # XNNPACK's lowering stores the weights of convolutions as float32 all the same.
    "fp16": (_Element.FLOAT16, _Element.ROUNDED),
}

_Order = tuple[int, ...]

Form = tuple[_Element, _Order]
"""Of a dense weight: what it consists of, and the order of its axes."""

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


def weight_keys(palette: Palette, precision: Precision) -> dict[str, Form]:
    """The forms that XNNPACK's lowering may give to a weight, by what it calls the data then."""
    dense = palette.dense()
    forms = product(_ELEMENTS[precision], _ORDERS[dense.ndim])
    return {_key(dense, form): form for form in forms}


def write_blob(palette: Palette, form: Form) -> bytes:
    """The palette of a weight, with its scale, to expand to this form."""
    element, order = form
    indices = np.ascontiguousarray(palette.indices.transpose(order))
    scale = b"" if palette.scale is None else palette.scale.tobytes()
    packed = pack(indices, palette.bits).tobytes()
    return b"".join((_header(palette, element, order), palette.lut.tobytes(), scale, packed))


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
        for element in _Element:
            if blob[_ELEMENT_FIELD] != element.to_bytes(2, "little"):
                continue
            palette = _read(blob, entry.bits, layout, (element, order))
            if palette is not None and _key(palette.dense(), (element, order)) == key:
                return palette
    raise InvalidInput("the packed weight is not what the program calls it")


def expanded_size(blob: bytes) -> int:
    """Bytes of the weight that a blob expands to.

    Raises:
        InvalidInput: when the blob is malformed.
    """
    _, _, element, outer, size, inner = _fields(blob)[:6]
    return _Element(element).size * outer * size * inner


def expand_blob(blob: bytes) -> npt.NDArray[Any]:
    """The weight in the order that its consumer wants, flat: what the native code computes.

    Raises:
        InvalidInput: when the blob is malformed.
    """
    bits, dim, element, outer, size, inner, groups, group_stride, scales, scale_stride = _fields(
        blob
    )
    along = -(-size // dim)
    luts, packed = 2 * groups * dim << bits, packed_size(outer * along * inner, bits)
    lut = np.frombuffer(blob, np.float16, luts // 2, _HEADER.size).astype(np.float32)
    codes = unpack(
        np.frombuffer(blob, np.uint8, packed, len(blob) - packed), bits, outer * along * inner
    )
    place = np.arange(outer * size * inner).reshape(outer, size, inner)
    group = place[:, ::dim] // group_stride % groups
    vectors = lut.reshape(groups, -1, dim)[group, codes.reshape(group.shape)]
    padded = np.moveaxis(vectors, 3, 2).reshape(outer, along * dim, inner)
    weight = np.ascontiguousarray(padded[:, :size])
    if scales:
        scale = np.frombuffer(blob, np.float32, scales, _HEADER.size + luts)
        weight *= scale[place // max(scale_stride, 1) % scales]
    return _Element(element).of(weight.reshape(-1))


def _fields(blob: bytes) -> tuple[int, ...]:
    """Bits, dim, element and the sizes of a header that is as the blob's length says.

    So a weight has at most 2048 times as many bytes as its blob, whatever the header says.
    """
    if len(blob) < _HEADER.size or not blob.startswith(_MAGIC):
        raise InvalidInput("not a packed weight")
    _, version, bits, dim, element, *sizes, _ = _HEADER.unpack_from(blob)
    if version != _VERSION or not 1 <= bits <= MAX_BITS or not 1 <= dim <= MAX_DIM:
        raise InvalidInput("the header of the packed weight is malformed")
    if element not in list(_Element):
        raise InvalidInput("the header of the packed weight is malformed")
    outer, size, inner, groups, group_stride, scales, _ = sizes
    if 0 in (outer, size, inner, groups, group_stride):
        raise InvalidInput("the header of the packed weight is malformed")
    packed = packed_size(outer * -(-size // dim) * inner, bits)
    if len(blob) != _HEADER.size + (2 * groups * dim << bits) + 4 * scales + packed:
        raise InvalidInput("the packed weight is of another size than its header says")
    return bits, dim, element, *sizes


def _key(dense: npt.NDArray[np.float32], form: Form) -> str:
    element, order = form
    return hashlib.sha256(np.ascontiguousarray(element.of(dense).transpose(order)).data).hexdigest()


def _header(palette: Palette, element: _Element, order: _Order) -> bytes:
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
        *(_MAGIC, _VERSION, palette.bits, layout.dim, element),
        *(layout.size // (size * inner), size, inner),
        *(layout.groups, group_stride, scales, scale_stride, 0),
    )


def _scale_axis(palette: Palette) -> int:
    """The axis of the output channels."""
    assert palette.scale is not None
    sizes = palette.scale.shape
    return max(range(len(sizes)), key=lambda axis: sizes[axis])


def _read(blob: bytes, bits: int, layout: Layout, form: Form) -> Palette | None:
    """The palette, or None when the blob is none of this layout in this form."""
    element, order = form
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
        if blob.startswith(_header(palette, element, order)):
            return palette
    return None
