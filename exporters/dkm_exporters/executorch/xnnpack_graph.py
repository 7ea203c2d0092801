"""The constants in a graph for XNNPACK, without trust in what it says.

Format: ``executorch/backends/xnnpack/serialization/schema.fbs``, of which the fields are numbered
here in the order in which they stand there, a union being two: its type, and itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

from dkm_exporters.executorch.tables import Table

_NODES, _VALUES, _CONSTANTS = 1, 2, 8
_UNION_TYPE, _UNION = 0, 1
_PLAIN_TENSOR: Final = 1
"""The first type of a value; the other is a tensor with what quantizes it."""
_NO_OFFSET: Final = (1 << 64) - 1
_MOST_AXES: Final = 64
"""Of a constant: sizes come from files, and are multiplied."""


class _Layer(NamedTuple):
    """The fields of a node that are a weight and a bias."""

    weight: int
    bias: int


_LAYERS: Final = {
    2: _Layer(1, 2),  # XNNFullyConnected
    7: _Layer(16, 17),  # XNNConv2d
    13: _Layer(16, 17),  # XNNDepthwiseConv2d
    39: _Layer(16, 17),  # XNNConvTranspose2d
}
"""By type of node."""


class _Scales(NamedTuple):
    """The fields of what quantizes: scales in the graph, where else, how many, weights of each."""

    inside: int
    place: int
    number: int
    block: int | None


_QUANTIZED: Final = {
    1: _Scales(0, 2, 3, None),  # PerChannelQuant
    4: _Scales(0, 4, 5, 2),  # PerChannelGroupQuant
}
"""By type of what quantizes."""

DATA_TYPES: Final = {
    1: ("float32", None),
    2: ("float16", None),
    3: ("int8", 8),
    4: ("uint8", 8),
    5: ("int32", 32),
    6: ("int8", 8),
    7: ("int32", 32),
    8: ("int4", 4),
    10: ("int4", 4),
    12: ("int32", None),
    13: ("float32", None),
    14: ("bfloat16", None),
}
"""By number: what values are, and bits of a quantized one."""


@dataclass(frozen=True)
class Place:
    """Where the bytes of a constant are.

    Attributes:
        key: of data that the program, or another file, has by name; empty if they are in the part.
        offset: in the part.
        size: in bytes.
    """

    key: str
    offset: int
    size: int


@dataclass(frozen=True)
class Constant:
    """A constant that a graph computes with.

    Attributes:
        number: of the value, which no other has.
        node: number of the node that has it as its weight or bias, or None.
        role: ``weight``, ``bias`` or empty.
        beside: number of the value that is the weight of the same node.
        data_type: see `DATA_TYPES`.
        shape: in the order of axes that XNNPACK wants.
        place: of its data.
        scales: how many there are; 0 where it is not quantized in channels or blocks.
        scale_bytes: of scales in the graph itself.
        scale_place: of the others.
        block: weights that share a scale, or None.
    """

    number: int
    node: int | None
    role: str
    beside: int | None
    data_type: int
    shape: tuple[int, ...]
    place: Place
    scales: int = 0
    scale_bytes: int = 0
    scale_place: Place | None = None
    block: int | None = None


def read_constants(processed: bytes) -> list[Constant]:
    """The constants that a delegated part computes with, in the order of its values.

    Args:
        processed: the part as XNNPACK's lowering wrote it.

    Raises:
        ValueError, IndexError, struct.error: when it is malformed.
    """
    header = XNNHeader.from_bytes(processed[: XNNHeader.EXPECTED_LENGTH])
    data = memoryview(processed)
    start, end = (
        header.constant_data_offset,
        header.constant_data_offset + header.constant_data_size,
    )
    if max(header.flatbuffer_offset + header.flatbuffer_size, end) > len(data):
        raise ValueError("cut short")
    graph = Table.root(data[header.flatbuffer_offset :][: header.flatbuffer_size])
    places = []
    for entry in graph.tables(_CONSTANTS):
        key, offset, size = entry.text(2), entry.number(0, "<Q"), entry.number(1, "<Q")
        if not key and offset != _NO_OFFSET and start + offset + size > end:
            raise ValueError("a constant ends after the part")
        places.append(Place(key, start + offset, size))
    roles = dict(_roles(graph))
    return [
        constant
        for value in graph.tables(_VALUES)
        if (constant := _constant(value, places, roles)) is not None
    ]


def _roles(graph: Table) -> Iterator[tuple[int, tuple[int, str, int]]]:
    """By number of a value: the node, what it is to it, and the node's weight."""
    for number, node in enumerate(graph.tables(_NODES)):
        fields = _LAYERS.get(node.number(_UNION_TYPE, "<B"))
        layer = node.table(_UNION)
        if fields is not None and layer is not None:
            weight = layer.number(fields.weight)
            yield weight, (number, "weight", weight)
            yield layer.number(fields.bias), (number, "bias", weight)


def _constant(
    value: Table, places: list[Place], roles: dict[int, tuple[int, str, int]]
) -> Constant | None:
    kind, outer = value.number(_UNION_TYPE, "<B"), value.table(_UNION)
    tensor = outer if kind == _PLAIN_TENSOR or outer is None else outer.table(0)
    if tensor is None or not tensor.number(3):  # 0 stands for no constant
        return None
    number, shape, place = tensor.number(6), tuple(tensor.numbers(2)), places[tensor.number(3)]
    if len(shape) > _MOST_AXES or (place.size and math.prod(shape) > 8 * place.size):
        raise ValueError("a constant has too many axes, or more values than bits")
    node, role, beside = roles.get(number, (None, "", None))
    constant = Constant(
        number,
        node,
        role,
        beside,
        tensor.number(0, "<h"),
        shape,
        place,
    )
    scales = _QUANTIZED.get(outer.number(1, "<B")) if outer is not tensor and outer else None
    quantization = outer.table(2) if scales is not None and outer is not None else None
    if scales is None or quantization is None:
        return constant
    inside, elsewhere = quantization.numbers(scales.inside, "<f"), quantization.number(scales.place)
    return replace(
        constant,
        scales=len(inside) or quantization.number(scales.number),
        scale_bytes=4 * len(inside),
        scale_place=places[elsewhere] if elsewhere and not inside else None,
        block=quantization.number(scales.block) if scales.block is not None else None,
    )
