"""Replace dense weights by the operators that decode them from a LUT and packed indices.

For a parameter ``conv.weight`` the graph holds the initializers

- ``conv.weight.lut``: float16 ``[groups * 2**bits, dim]``,
- ``conv.weight.indices``: uint8 ``[ceil(n * bits / 8)]``, packed by `pack_fields`; for a weight
  whose rows are looked up and fill whole bytes, each row by itself: ``[rows, bytes of a row]``,
- ``conv.weight.scale``: float32 that broadcasts to the weight, where a batch norm was folded in,

and shared constants ``dkm/...``. No operator or type is newer than opset 11. ONNX Runtime by
default folds the decoders when it loads the model, and then runs at the speed of dense weights.
Where rows of a weight are looked up, as an embedding does, only these rows are decoded, at each
inference: the vocabulary stays packed in RAM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from dkm_export.errors import Unsupported
from dkm_export.fields import Field, fields, pack_fields
from dkm_export.palette import Layout, Palette, packed_size
from dkm_exporters.onnx.placing import Called, Constants, Inline


def insert_decoders(
    model: ir.Model,
    palettes: Mapping[str, Palette],
    ties: Mapping[str, str] = {},
    *,
    functions: bool = False,
) -> None:
    """Replace the initializer of every palette by a subgraph that decodes it, in place.

    Args:
        model: in which a weight may have any of its names.
        palettes: by parameter name.
        ties: other names of these parameters, each with its name in ``palettes``.
        functions: write decoders as functions that the graph calls.

    Raises:
        Unsupported: for a palette whose weight is not in the graph.
    """
    graph = model.graph
    constants = Constants(model)
    place = Called if functions else Inline
    for name, palette in palettes.items():
        names = [name, *(tie for tie, owner in ties.items() if owner == name)]
        dense = [graph.initializers.pop(n) for n in names if n in graph.initializers]
        lookups = [node for value in dense for node in _row_lookups(value, palette)]
        by_row = bool(lookups) and _fills_bytes(palette)
        stored = _store(constants, name, palette, by_row)
        for node in lookups:
            rows = _Decoder(place(constants, node.name or name), palette, stored).rows(node)
            rows.dtype, rows.shape = ir.DataType.FLOAT, node.outputs[0].shape
            node.outputs[0].replace_all_uses_with(rows)
            graph.remove(node, safe=True)
        rest = [value for value in dense if value.uses()]
        if rest:
            weight = _Decoder(place(constants, name), palette, stored).weight()
            weight.name = name
            weight.dtype, weight.shape = ir.DataType.FLOAT, ir.Shape(palette.layout.shape)
            for value in rest:
                value.replace_all_uses_with(weight)
        elif not lookups:
            raise Unsupported(
                f"onnx: {name} is not used by the model: "
                "remove the layer or add a rule with skip = true for it"
            )
    # The sort is stable and places nodes late: each decoder right before its weight's first use.
    graph.sort()


def _row_lookups(value: ir.Value, palette: Palette) -> list[ir.Node]:
    """The nodes that take rows of a weight and can as well take them of its indices."""
    if len(palette.layout.shape) != 2 or palette.scale is not None:
        return []
    return [
        node
        for node, position in value.uses()
        if node.op_type == "Gather"
        and position == 0
        and node.attributes.get_int("axis", 0) == 0
        and not node.outputs[0].is_graph_output()
        and (ids := node.inputs[1]) is not None
        and ids.shape is not None
    ]


def _fills_bytes(palette: Palette) -> bool:
    """Whether each field of a row of indices fills whole bytes."""
    per_row = palette.layout.index_shape[1]
    return all(per_row * field.width % 8 == 0 for field in fields(palette.bits))


def _store(constants: Constants, name: str, palette: Palette, by_row: bool) -> dict[str, ir.Value]:
    """The initializers of a palette, by what they are."""
    indices = palette.indices if by_row else palette.indices.reshape(-1)
    arrays: dict[str, Any] = {
        "lut": palette.lut.reshape(-1, palette.layout.dim),
        "indices": pack_fields(indices, palette.bits),
    }
    if palette.scale is not None:
        arrays["scale"] = palette.scale
    return {role: constants.initializer(f"{name}.{role}", array) for role, array in arrays.items()}


class _Decoder:
    """Writes the nodes that decode a weight or rows of it, bit for bit `Palette.dense`.

    Args:
        place: where they go.
        palette: of the weight.
        stored: its initializers, by what they are.
    """

    def __init__(self, place: Inline, palette: Palette, stored: Mapping[str, ir.Value]) -> None:
        self._place, self._palette, self._layout = place, palette, palette.layout
        self._lut = self._cast(place.take(stored["lut"], "lut"), ir.DataType.FLOAT)
        self._indices = place.take(stored["indices"], "indices")
        self._stored = stored
        self._per_row = palette.layout.index_shape[1] if _is_by_row(stored) else 0

    def weight(self) -> ir.Value:
        """The whole weight, float32."""
        stream = self._cast(self._indices, ir.DataType.INT32)
        if _by_byte(self._palette):
            vectors = self._look_up_bytes(stream)
        else:
            rows = (self._layout.index_shape[0],) if self._per_row else ()
            codes = self._codes(stream, rows)
            if self._layout.groups > 1:
                codes = self._reshape(codes, (self._layout.groups, 1, -1))
                codes = self._offset(codes, 1 << self._palette.bits)
            vectors = self._node("Gather", self._lut, codes, axis=0)
        weight = self._arrange(vectors)
        if self._palette.scale is not None:
            weight = self._node("Mul", weight, self._place.take(self._stored["scale"], "scale"))
        by_row = "_rows" if self._per_row else ""
        return self._place.finish(weight, f"LutDequantize_{_signature(self._palette)}{by_row}")

    def rows(self, lookup: ir.Node) -> ir.Value:
        """What ``lookup``, a Gather of rows of the weight, would give."""
        layout, bits = self._layout, self._palette.bits
        given = lookup.inputs[1]
        assert given is not None
        assert given.dtype is not None
        rank = _rank(given)
        ids = self._place.take(given, "ids")
        if given.dtype != ir.DataType.INT64:
            ids = self._cast(ids, ir.DataType.INT64)
        # Along axis 0, a row of indices stands for ``dim`` rows of the weight.
        height = layout.dim if layout.axis == 0 else 1
        row = self._node("Div", ids, self._integer(height)) if height > 1 else ids
        if self._per_row:
            stream = self._node("Gather", self._indices, row, axis=0)
            codes = self._codes(self._cast(stream, ir.DataType.INT32), (0,) * rank)
        else:
            codes = self._codes_at(row)
        if layout.groups > 1:
            group = self._node("Div", ids, self._integer(layout.shape[0] // layout.groups))
            codes = self._add_to_each(codes, group, 1 << bits)
        if height > 1:
            codes = self._node("Mul", codes, self._integer(height, np.int32))
            within = self._node("Sub", ids, self._node("Mul", row, self._integer(height)))
            codes = self._add_to_each(codes, within, 1)
        if height > 1 or layout.dim == 1:
            rows = self._node("Gather", self._reshape(self._lut, (-1,)), codes, axis=0)
        else:
            rows = self._node("Gather", self._lut, codes, axis=0)
            rows = self._reshape(rows, (*(0,) * rank, -1))
            if layout.padding:
                rows = self._slice(rows, 0, layout.shape[1], rank)
        kind = f"{rank}d_{given.dtype.name.lower()}"
        return self._place.finish(rows, f"LutGather_{_signature(self._palette)}_{kind}")

    def _codes_at(self, row: ir.Value) -> ir.Value:
        """The indices in rows that begin anywhere in a byte: int32 ``[..., indices of a row]``."""
        layout = self._layout
        per_row = layout.index_shape[1]
        first = self._node("Mul", row, self._integer(per_row))
        last_axis = self._place.constant(np.array([-1], np.int64))
        first = self._node("Unsqueeze", first, last_axis)
        numbers = [self._integer(n) for n in (0, per_row, 1)]
        position = self._node("Add", first, self._node("Range", *numbers))
        parts = []
        for field in fields(self._palette.bits):
            per_byte = 8 // field.width
            start = layout.vectors * field.shift // field.width
            at = self._node("Add", position, self._integer(start)) if start else position
            byte = self._node("Div", at, self._integer(per_byte))
            within = self._node("Sub", at, self._node("Mul", byte, self._integer(per_byte)))
            packed = self._node("Gather", self._indices, byte, axis=0)
            entry = self._node(
                "Mul", self._cast(packed, ir.DataType.INT64), self._integer(per_byte)
            )
            table = self._reshape(self._place.table(field), (-1,))
            entry = self._node("Add", entry, within)
            parts.append(self._node("Gather", table, entry, axis=0))
        return self._sum(parts)

    def _add_to_each(self, codes: ir.Value, numbers: ir.Value, factor: int) -> ir.Value:
        """Add ``factor * numbers[...]``, int64, to int32 ``codes[..., n]``."""
        narrow = self._cast(numbers, ir.DataType.INT32)
        if factor > 1:
            narrow = self._node("Mul", narrow, self._integer(factor, np.int32))
        last_axis = self._place.constant(np.array([-1], np.int64))
        return self._node("Add", codes, self._node("Unsqueeze", narrow, last_axis))

    def _look_up_bytes(self, stream: ir.Value) -> ir.Value:
        """The vectors, from a LUT that is first expanded to the ``8 / bits`` vectors per byte.

        That is one lookup per byte instead of two per index, where a runtime does not fold it.
        """
        layout, bits = self._layout, self._palette.bits
        (field,) = fields(bits)
        per_byte = 8 // bits
        rows = self._place.table(field)
        if layout.groups > 1:
            rows = self._offset(rows, 1 << bits)
            stream = self._offset(self._reshape(stream, (layout.groups, 1, -1)), 256)
        byte_lut = self._node("Gather", self._lut, rows, axis=0)
        if layout.groups > 1:
            byte_lut = self._reshape(byte_lut, (layout.groups * 256, per_byte, layout.dim))
        vectors = self._node("Gather", byte_lut, stream, axis=0)
        if layout.vectors % per_byte:
            vectors = self._reshape(vectors, (-1, layout.dim))
            vectors = self._slice(vectors, 0, layout.vectors)
        return vectors

    def _codes(self, stream: ir.Value, start: tuple[int, ...]) -> ir.Value:
        """The indices, put together from their fields.

        Args:
            stream: int32, of as many axes as ``start`` has entries, and one of bytes.
            start: first sizes to reshape to; 0 keeps an axis.
        """
        count = self._per_row or self._layout.vectors
        return self._sum(
            [self._field(field, count, stream, start) for field in fields(self._palette.bits)]
        )

    def _field(
        self, field: Field, count: int, stream: ir.Value, start: tuple[int, ...]
    ) -> ir.Value:
        """int32 ``[*start, count]``: one field of every index, at its place in the index."""
        if field.width == 8:
            return stream
        first, skipped = divmod(count * field.shift, 8)
        last = -(-count * (field.shift + field.width) // 8)
        if field.width < self._palette.bits:
            stream = self._slice(stream, first, last, len(start))
        codes = self._node("Gather", self._place.table(field), stream, axis=0)
        codes = self._reshape(codes, (*start, -1))
        if (last - first) * 8 > count * field.width:
            skip = skipped // field.width
            codes = self._slice(codes, skip, skip + count)
        return codes

    def _arrange(self, vectors: ir.Value) -> ir.Value:
        """`Layout.from_vectors` in ONNX operators."""
        layout = self._layout
        before, after = layout.shape[: layout.axis], layout.shape[layout.axis + 1 :]
        if layout.dim > 1 and math.prod(after) > 1:
            blocks = (math.prod(before), layout.index_shape[layout.axis], math.prod(after))
            vectors = self._reshape(vectors, (*blocks, layout.dim))
            vectors = self._node("Transpose", vectors, perm=[0, 1, 3, 2])
        size = layout.shape[layout.axis]
        weight = self._reshape(vectors, (*before, size + layout.padding, *after))
        return self._slice(weight, 0, size, layout.axis) if layout.padding else weight

    def _offset(self, numbers: ir.Value, step: int) -> ir.Value:
        """Add ``step`` for each group to row numbers that broadcast to ``[groups, 1, n]``."""
        starts = np.arange(self._layout.groups, dtype=np.int32).reshape(-1, 1, 1) * np.int32(step)
        return self._node("Add", numbers, self._place.constant(starts))

    def _sum(self, parts: list[ir.Value]) -> ir.Value:
        total, *rest = parts
        for part in rest:
            total = self._node("Add", total, part)
        return total

    def _slice(self, value: ir.Value, start: int, stop: int, axis: int = 0) -> ir.Value:
        bounds = [self._place.constant(np.array([n], np.int64)) for n in (start, stop, axis)]
        return self._node("Slice", value, *bounds)

    def _reshape(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        return self._node("Reshape", value, self._place.constant(np.array(shape, np.int64)))

    def _integer(self, value: int, dtype: type[np.integer[Any]] = np.int64) -> ir.Value:
        return self._place.constant(np.array(value, dtype))

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self._node("Cast", value, to=dtype)

    def _node(self, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self._place.node(operator, inputs, **attributes)


def _rank(value: ir.Value) -> int:
    assert value.shape is not None
    return len(value.shape)


def _is_by_row(stored: Mapping[str, ir.Value]) -> bool:
    """Whether each row of indices is packed by itself."""
    return _rank(stored["indices"]) > 1


def _by_byte(palette: Palette) -> bool:
    """Whether bytes can be looked up, and a LUT of all bytes is no larger than the weight."""
    layout, bits = palette.layout, palette.bits
    whole_bytes = layout.groups == 1 or layout.vectors // layout.groups * bits % 8 == 0
    large = 256 * layout.groups <= packed_size(layout.vectors, bits)
    return bits in (1, 2, 4) and whole_bytes and large


def _signature(palette: Palette) -> str:
    """What a function's name says: all that decides its body."""
    layout: Layout = palette.layout
    parts = [f"{palette.bits}x{layout.dim}", "x".join(map(str, layout.shape))]
    if layout.axis:
        parts.append(f"axis{layout.axis}")
    if layout.groups > 1:
        parts.append(f"groups{layout.groups}")
    if palette.scale is not None:
        parts.append(f"scaled{'x'.join(map(str, palette.scale.shape))}")
    return "_".join(parts)
