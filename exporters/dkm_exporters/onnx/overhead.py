"""What the operators that decode a palette take in a file."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import onnx_ir as ir

from dkm_export.exporting import Overhead
from dkm_export.palette import Layout, Palette
from dkm_exporters.onnx.decoding import insert_decoders
from dkm_exporters.onnx.placing import TABLE

_NARROW = 8
"""Size of axes on which operators hardly depend."""

_PREFIX = "layers."


def decoder_overhead(layout: Layout, bits: int, *, functions: bool) -> Overhead:
    """Bytes of one more decoder in a file that has such a one already, and of its tables.

    About: sizes of axes are those of a narrower weight, and nothing looks rows up.
    """
    shape = tuple(
        size if axis in (0, layout.axis) else min(size, _NARROW)
        for axis, size in enumerate(layout.shape)
    )
    return _overhead(Layout(shape, layout.dim, layout.axis, layout.groups), bits, functions)


@lru_cache(maxsize=4096)
def _overhead(layout: Layout, bits: int, functions: bool) -> Overhead:
    one, two = (_decoders(layout, bits, functions, count) for count in (1, 2))
    tables = {
        name: value.const_value.nbytes
        for name, value in one.graph.initializers.items()
        if name.startswith(TABLE) and value.const_value is not None
    }
    return Overhead(_bytes(two) - _bytes(one), tables)


def _decoders(layout: Layout, bits: int, functions: bool, count: int) -> ir.Model:
    """A model that does nothing but to decode."""
    lut = np.zeros((layout.groups, 1 << bits, layout.dim), np.float16)
    palette = Palette(bits, layout, lut, np.zeros(layout.index_shape, np.uint8))
    names = [f"{_PREFIX}{index}.weight" for index in range(count)]
    weight = np.zeros(layout.shape, np.float32)
    values = [ir.val(name, const_value=ir.tensor(weight, name=name)) for name in names]
    nodes = [ir.node("Neg", [value]) for value in values]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 18})
    model = ir.Model(graph, ir_version=8)
    insert_decoders(model, dict.fromkeys(names, palette), functions=functions)
    return model


def _bytes(model: ir.Model) -> int:
    """Of the file, without LUTs and indices."""
    stored = [
        value.const_value.nbytes
        for name, value in model.graph.initializers.items()
        if name.startswith(_PREFIX) and value.const_value is not None
    ]
    return len(ir.to_proto(model).SerializeToString()) - sum(stored)
