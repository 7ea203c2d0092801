"""Replace dense weights by the operators that decode them from a LUT and packed indices.

For a parameter ``conv.weight`` the graph holds the initializers

- ``conv.weight.lut``: float16 ``[groups * 2**bits, dim]``,
- ``conv.weight.indices``: uint8, ``ceil(n * bits / 8)`` bytes, by `pack_indices`,
- ``conv.weight.scale``: float32 that broadcasts to the weight, where a batch norm was folded in,

and shared constants ``dkm/...``. No operator or type is newer than opset 13. ONNX Runtime by
default folds the decoders when it loads the model, and then runs at the speed of dense weights.
Where rows of a weight are looked up, as an embedding does, only these rows are decoded, at each
inference: the vocabulary stays packed in RAM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from dkm_export.errors import Unsupported
from dkm_export.fields import Field, fields
from dkm_export.palette import Layout, Palette
from dkm_exporters.onnx.packing import joined, pack_indices, rows_fill_bytes, transposed
from dkm_exporters.onnx.placing import ONCE, TABLE, Called, Constants, Inline


def insert_decoders(
    model: ir.Model,
    palettes: Mapping[str, Palette],
    ties: Mapping[str, str] = {},
    *,
    functions: bool = False,
) -> list[str]:
    """Replace the initializer of every palette by a subgraph that decodes it, in place.

    Args:
        model: in which a weight may have any of its names.
        palettes: by parameter name.
        ties: other names of these parameters, each with its name in ``palettes``.
        functions: write decoders as functions that the graph calls.

    Returns:
        Names of the palettes that are stored transposed, see `transposed`.

    Raises:
        Unsupported: for a palette whose weight is not in the graph.
    """
    graph = model.graph
    constants = Constants(model)
    place = Called if functions else Inline
    turned = []
    for name, palette in palettes.items():
        names = [name, *(tie for tie, owner in ties.items() if owner == name)]
        dense = [graph.initializers.pop(n) for n in names if n in graph.initializers]
        lookups = [node for value in dense for node in _row_lookups(value, palette)]
        transposes = [] if lookups else _transposes(dense, palette)
        if transposes:
            palette = transposed(palette)
            turned.append(name)
        stored = _store(constants, name, palette, looked_up=bool(lookups))
        for node in lookups:
            rows = _Decoder(place(constants, node.name or name), palette, stored).rows(node)
            rows.name = node.outputs[0].name
            rows.dtype, rows.shape = ir.DataType.FLOAT, node.outputs[0].shape
            node.outputs[0].replace_all_uses_with(rows, replace_graph_outputs=True)
            graph.remove(node, safe=True)
        rest = [value for value in dense if value.uses()]
        if rest:
            weight = _Decoder(place(constants, name), palette, stored).weight()
            weight.name = f"{name}.T" if transposes else name
            weight.dtype, weight.shape = ir.DataType.FLOAT, ir.Shape(palette.layout.shape)
            for value in [node.outputs[0] for node in transposes] or rest:
                value.replace_all_uses_with(weight)
            for node in transposes:
                graph.remove(node, safe=True)
        elif not lookups:
            raise Unsupported(
                f"onnx: {name} is not used by the model: "
                "remove the layer or add a rule with skip = true for it"
            )
    # The sort is stable and places nodes late: each decoder right before its weight's first use.
    graph.sort()
    return turned


def _transposes(values: Sequence[ir.Value], palette: Palette) -> list[ir.Node]:
    """The nodes that transpose a weight, if that is all that is done with it.

    Linear layers multiply by the transposed weight. Indices that are transposed once, here, save
    the node, which would be the most expensive one of the decoder.
    """
    nodes = [node for value in values for node, _ in value.uses()]
    layout = palette.layout
    alone = all(
        node.op_type == "Transpose"
        and tuple(node.attributes.get_ints("perm", (1, 0))) == (1, 0)
        and not node.outputs[0].is_graph_output()
        for node in nodes
    )
    return nodes if alone and len(layout.shape) == 2 and layout.groups == 1 else []


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
        and (ids := node.inputs[1]) is not None
        and ids.shape is not None
    ]


def _store(
    constants: Constants, name: str, palette: Palette, *, looked_up: bool
) -> dict[str, ir.Value]:
    """The initializers of a palette, by what they are."""
    arrays: dict[str, Any] = {
        "lut": palette.lut.reshape(-1, palette.layout.dim),
        "indices": pack_indices(palette.indices, palette.bits, palette.layout, looked_up=looked_up),
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
        shape = stored["indices"].shape
        assert shape is not None
        # how many rows the packed indices have, where rows of them are looked up
        rows = shape[0] if len(shape) == 2 else 0
        assert isinstance(rows, int)
        self._rows = rows

    def weight(self) -> ir.Value:
        """The whole weight, float32.

        As few nodes as can be have its size: folding at load takes time and memory for each.
        """
        layout = self._layout
        each = 1 if self._rows else joined(self._palette.bits, layout)
        numbers, lut = self._numbers(each), self._lut if each == 1 else self._joint_lut(each)
        before, after = layout.shape[: layout.axis], layout.shape[layout.axis + 1 :]
        blocks = (math.prod(before), layout.index_shape[layout.axis], math.prod(after))
        turned = layout.dim > 1 and blocks[2] > 1
        if turned and blocks[2] % each == 0:
            numbers = self._reshape(numbers, (*blocks[:2], blocks[2] // each))
            vectors = self._node("Gather", lut, numbers, axis=0)
            perm = [0, 1, 3, 2] if each == 1 else [0, 1, 4, 2, 3]
            vectors = self._node("Transpose", vectors, perm=perm)
        else:
            vectors = self._node("Gather", lut, numbers, axis=0)
            if turned:
                vectors = self._reshape(vectors, (*blocks, layout.dim))
                vectors = self._node("Transpose", vectors, perm=[0, 1, 3, 2])
        weight = self._crop(vectors)
        if self._palette.scale is not None:
            weight = self._node("Mul", weight, self._place.take(self._stored["scale"], "scale"))
        rows = "_rows" if self._rows else ""
        return self._place.finish(weight, f"LutDequantize_{_signature(self._palette)}{rows}")

    def _numbers(self, each: int) -> ir.Value:
        """Rows of the LUT for ``each`` vectors at once: int32 of any shape."""
        layout, bits = self._layout, self._palette.bits * each
        stream = self._cast(self._indices, ir.DataType.INT32)
        if self._rows:
            numbers = self._unpack(stream, bits, layout.vectors // self._rows, (self._rows,))
        else:
            numbers = self._unpack(stream, bits, layout.vectors // each, ())
        if layout.groups > 1:
            numbers = self._offset(self._reshape(numbers, (layout.groups, 1, -1)), 1 << bits)
        return numbers

    def _joint_lut(self, each: int) -> ir.Value:
        """The ``each`` vectors that every number stands for: ``[groups * numbers, each, dim]``."""
        layout, bits = self._layout, self._palette.bits
        count = 1 << (bits * each)

        def codes(place: Inline) -> ir.Value:
            """int32 ``[count, each]``: the indices in each number, lowest bits first."""
            ends = [place.constant(np.array(n, np.int32)) for n in (0, count, 1)]
            column = place.constant(np.array([-1, 1], np.int64))
            numbers = place.node("Reshape", [place.node("Range", ends), column])
            factors = place.constant(1 << np.arange(0, bits * each, bits, dtype=np.int32))
            size = place.constant(np.array(1 << bits, np.int32))
            return place.node("Mod", [place.node("Div", [numbers, factors]), size])

        rows = self._place.once(f"{ONCE}indices/{bits}x{each}", codes)
        if layout.groups > 1:
            rows = self._offset(rows, 1 << bits)
        lut = self._node("Gather", self._lut, rows, axis=0)
        if layout.groups > 1:
            lut = self._reshape(lut, (layout.groups * count, each, layout.dim))
        return lut

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
        aligned = rows_fill_bytes(bits, layout)
        if height > 1 or layout.groups > 1 or not aligned:
            ids = self._count_from_start(ids)
        row = self._node("Div", ids, self._integer(height)) if height > 1 else ids
        if aligned:
            stream = self._node("Gather", self._indices, row, axis=0)
            stream = self._cast(stream, ir.DataType.INT32)
            codes = self._unpack(stream, bits, layout.index_shape[1], (0,) * rank)
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

    def _count_from_start(self, ids: ir.Value) -> ir.Value:
        """Row numbers without negative ones, which Gather takes for rows from the end."""
        negative = self._node("Less", ids, self._integer(0))
        from_end = self._node("Add", ids, self._integer(self._layout.shape[0]))
        return self._node("Where", negative, from_end, ids)

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
            first_axis = self._place.constant(np.array([0], np.int64))
            packed = self._node("Gather", self._indices, byte, axis=1)
            packed = self._node("Squeeze", packed, first_axis)
            entry = self._node(
                "Mul", self._cast(packed, ir.DataType.INT64), self._integer(per_byte)
            )
            table = self._reshape(self._table(field), (-1,))
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

    def _unpack(self, stream: ir.Value, bits: int, count: int, start: tuple[int, ...]) -> ir.Value:
        """int32 ``[*start, count]``: numbers of ``bits`` bits, put together from their fields.

        Args:
            stream: int32, of as many axes as ``start`` has entries, and one of bytes.
            bits: of a number.
            count: numbers in a row.
            start: first sizes to reshape to; 0 keeps an axis.
        """
        return self._sum([self._field(field, bits, count, stream, start) for field in fields(bits)])

    def _field(
        self, field: Field, bits: int, count: int, stream: ir.Value, start: tuple[int, ...]
    ) -> ir.Value:
        """One field of every number, at its place in the number."""
        first, skipped = divmod(count * field.shift, 8)
        last = -(-count * (field.shift + field.width) // 8)
        if field.width < bits:
            stream = self._slice(stream, first, last, len(start))
        if field.width == 8:
            return stream
        codes = self._node("Gather", self._table(field), stream, axis=0)
        codes = self._reshape(codes, (*start, -1))
        if (last - first) * 8 > count * field.width:
            skip = skipped // field.width
            codes = self._slice(codes, skip, skip + count, len(start))
        return codes

    def _table(self, field: Field) -> ir.Value:
        """int32 ``[256, 8 / width]``: the fields in each byte, at their place in the number."""

        def make(place: Inline) -> ir.Value:
            table = place.node("Cast", [place.table(field.width)], to=ir.DataType.INT32)
            if not field.shift:
                return table
            factor = place.constant(np.array(1 << field.shift, np.int32))
            return place.node("Mul", [table, factor])

        return self._place.once(f"{TABLE}{field.width}/{field.shift}", make)

    def _crop(self, vectors: ir.Value) -> ir.Value:
        """Vectors in the order of the weight, in its shape and without the padding."""
        layout = self._layout
        size = layout.shape[layout.axis]
        padded = (
            *layout.shape[: layout.axis],
            size + layout.padding,
            *layout.shape[layout.axis + 1 :],
        )
        weight = self._reshape(vectors, padded)
        return self._slice(weight, 0, size, layout.axis) if layout.padding else weight

    def _offset(self, numbers: ir.Value, step: int) -> ir.Value:
        """Add ``step`` for each group to row numbers that broadcast to ``[groups, 1, n]``."""
        ends = [self._integer(n, np.int32) for n in (0, self._layout.groups * step, step)]
        starts = self._reshape(self._node("Range", *ends), (-1, 1, 1))
        return self._node("Add", numbers, starts)

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
