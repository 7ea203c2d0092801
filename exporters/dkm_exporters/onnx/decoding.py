"""Replace dense weights by the operators that decode them from a LUT and packed indices.

For a parameter ``conv.weight`` the graph holds the initializers

- ``conv.weight.lut``: float16 ``[groups * 2**bits, dim]``,
- ``conv.weight.indices``: uint8 ``[ceil(n * bits / 8)]``, packed by `pack_fields`,
- ``conv.weight.scale``: float32 that broadcasts to the weight, where a batch norm was folded in,

and shared constants ``dkm/...``. No operator or type is newer than opset 11. ONNX Runtime by
default folds the decoders when it loads the model, and then runs at the speed of dense weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dkm_export.errors import Unsupported
from dkm_export.fields import Field, fields, pack_fields
from dkm_export.palette import Layout, Palette, packed_size


def insert_decoders(
    model: ir.Model, palettes: Mapping[str, Palette], ties: Mapping[str, str] = {}
) -> None:
    """Replace the initializer of every palette by a subgraph that decodes it, in place.

    Args:
        model: in which a weight may have any of its names.
        palettes: by parameter name.
        ties: other names of these parameters, each with its name in ``palettes``.

    Raises:
        Unsupported: for a palette whose weight is not in the graph.
    """
    graph = model.graph
    decoder = _Decoder(graph)
    for name, palette in palettes.items():
        names = [name, *(tie for tie, owner in ties.items() if owner == name)]
        dense = [graph.initializers.pop(n) for n in names if n in graph.initializers]
        if not dense:
            raise Unsupported(
                f"onnx: {name} is not used by the model: "
                "remove the layer or add a rule with skip = true for it"
            )
        weight = decoder.decode(name, palette)
        for value in dense:
            value.replace_all_uses_with(weight)
    # The sort is stable and places nodes late: each decoder right before its weight's first use.
    graph.sort()


class _Decoder:
    """Appends decoders to a graph; those of equal constants share them."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._shared: dict[str, ir.Value] = {}

    def decode(self, name: str, palette: Palette) -> ir.Value:
        """The float32 weight ``name``, bit for bit `Palette.dense`."""
        layout = palette.layout
        lut = self._initializer(f"{name}.lut", palette.lut.reshape(-1, layout.dim))
        packed = self._initializer(f"{name}.indices", pack_fields(palette.indices, palette.bits))
        centroids = self._node(name, "Cast", [lut], to=ir.DataType.FLOAT)
        stream = self._node(name, "Cast", [packed], to=ir.DataType.INT32)
        if _by_byte(palette):
            vectors = self._look_up_bytes(name, palette, centroids, stream)
        else:
            vectors = self._look_up_codes(name, palette, centroids, stream)
        weight = self._arrange(name, vectors, layout)
        if palette.scale is not None:
            scale = self._initializer(f"{name}.scale", palette.scale)
            weight = self._node(name, "Mul", [weight, scale])
        weight.name = name
        weight.dtype, weight.shape = ir.DataType.FLOAT, ir.Shape(layout.shape)
        return weight

    def _look_up_bytes(
        self, name: str, palette: Palette, centroids: ir.Value, stream: ir.Value
    ) -> ir.Value:
        """The vectors, from a LUT that is first expanded to the ``8 / bits`` vectors per byte.

        That is one lookup per byte instead of two per index, where a runtime does not fold it.
        """
        layout, (field,) = palette.layout, fields(palette.bits)
        per_byte = 8 // palette.bits
        rows = self._table(field)
        if layout.groups > 1:
            rows = self._offset(name, rows, layout.groups, 1 << palette.bits)
            stream = self._reshape(name, stream, (layout.groups, 1, -1))
            stream = self._offset(name, stream, layout.groups, 256)
        byte_lut = self._node(name, "Gather", [centroids, rows], axis=0)
        if layout.groups > 1:
            byte_lut = self._reshape(name, byte_lut, (layout.groups * 256, per_byte, layout.dim))
        vectors = self._node(name, "Gather", [byte_lut, stream], axis=0)
        if layout.vectors % per_byte:
            vectors = self._reshape(name, vectors, (-1, layout.dim))
            vectors = self._slice(name, vectors, 0, layout.vectors)
        return vectors

    def _look_up_codes(
        self, name: str, palette: Palette, centroids: ir.Value, stream: ir.Value
    ) -> ir.Value:
        """The vectors, from indices that are first put together from their fields."""
        layout = palette.layout
        codes, *rest = [
            self._codes(name, field, layout.vectors, palette.bits, stream)
            for field in fields(palette.bits)
        ]
        for field_codes in rest:
            codes = self._node(name, "Add", [codes, field_codes])
        if layout.groups > 1:
            codes = self._reshape(name, codes, (layout.groups, 1, -1))
            codes = self._offset(name, codes, layout.groups, 1 << palette.bits)
        return self._node(name, "Gather", [centroids, codes], axis=0)

    def _codes(self, name: str, field: Field, count: int, bits: int, stream: ir.Value) -> ir.Value:
        """int32 ``[count]``: one field of every index, at its place in the index."""
        if field.width == 8:
            return stream
        first, start = divmod(count * field.shift, 8)
        last = -(-count * (field.shift + field.width) // 8)
        if field.width < bits:
            stream = self._slice(name, stream, first, last)
        codes = self._node(name, "Gather", [self._table(field), stream], axis=0)
        codes = self._reshape(name, codes, (-1,))
        if (last - first) * 8 > count * field.width:
            skip = start // field.width
            codes = self._slice(name, codes, skip, skip + count)
        return codes

    def _arrange(self, name: str, vectors: ir.Value, layout: Layout) -> ir.Value:
        """`Layout.from_vectors` in ONNX operators."""
        before, after = layout.shape[: layout.axis], layout.shape[layout.axis + 1 :]
        if layout.dim > 1 and math.prod(after) > 1:
            blocks = (math.prod(before), layout.index_shape[layout.axis], math.prod(after))
            vectors = self._reshape(name, vectors, (*blocks, layout.dim))
            vectors = self._node(name, "Transpose", [vectors], perm=[0, 1, 3, 2])
        size = layout.shape[layout.axis]
        weight = self._reshape(name, vectors, (*before, size + layout.padding, *after))
        return self._slice(name, weight, 0, size, layout.axis) if layout.padding else weight

    def _offset(self, name: str, numbers: ir.Value, groups: int, step: int) -> ir.Value:
        """Add ``step`` for each group to row numbers that broadcast to ``[groups, 1, n]``."""
        starts = np.arange(groups, dtype=np.int32).reshape(-1, 1, 1) * np.int32(step)
        offsets = self._constant(f"dkm/groups/{groups}x{step}", starts)
        return self._node(name, "Add", [numbers, offsets])

    def _slice(self, name: str, value: ir.Value, start: int, stop: int, axis: int = 0) -> ir.Value:
        bounds = [self._integers(start), self._integers(stop), self._integers(axis)]
        return self._node(name, "Slice", [value, *bounds])

    def _reshape(self, name: str, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        return self._node(name, "Reshape", [value, self._integers(*shape)])

    def _table(self, field: Field) -> ir.Value:
        """`Field.table` as int32, stored as uint8."""
        name = f"dkm/table/{field.width}/{field.shift}"
        if name not in self._shared:
            table = self._initializer(f"{name}/bytes", field.table())
            self._shared[name] = self._node(name, "Cast", [table], to=ir.DataType.INT32)
        return self._shared[name]

    def _integers(self, *values: int) -> ir.Value:
        return self._constant(f"dkm/{'x'.join(map(str, values))}", np.array(values, np.int64))

    def _constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        if name not in self._shared:
            self._shared[name] = self._initializer(name, array)
        return self._shared[name]

    def _initializer(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self._graph.register_initializer(value)
        return value

    def _node(
        self, name: str, operator: str, inputs: Sequence[ir.Value], **attributes: Any
    ) -> ir.Value:
        node = ir.node(operator, inputs, attributes, name=f"{name}/{operator}")
        node.outputs[0].name = node.name
        self._graph.append(node)
        return node.outputs[0]


def _by_byte(palette: Palette) -> bool:
    """Whether bytes can be looked up, and a LUT of all bytes is no larger than the weight."""
    layout, bits = palette.layout, palette.bits
    whole_bytes = layout.groups == 1 or layout.vectors // layout.groups * bits % 8 == 0
    large = 256 * layout.groups <= packed_size(layout.vectors, bits)
    return bits in (1, 2, 4) and whole_bytes and large
