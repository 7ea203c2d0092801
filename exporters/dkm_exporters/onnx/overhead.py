"""What the operators that decode a palette take in a file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import onnx_ir as ir

from dkm_export.exporting import Overhead
from dkm_export.palette import Layout, Palette
from dkm_exporters.onnx.decoding import insert_decoders
from dkm_exporters.onnx.packing import joined
from dkm_exporters.onnx.placing import ONCE

_SMALL = 1 << 17
"""Weights of layouts that are taken as they are."""

_NARROW = (8, 32, 128)
"""Sizes of axes at which operators may be the same as at the full size."""


def decoder_overhead(name: str, layout: Layout, bits: int, *, functions: bool) -> Overhead:
    """Bytes of one more decoder in a file that has such a one already, and of what they share.

    About: the weight may be a narrower one, and nothing looks its rows up.
    """
    return _overhead(len(name), _narrowed(layout, bits), bits, functions)


def _narrowed(layout: Layout, bits: int) -> Layout:
    """A smaller layout with the same operators: large ones take time to pack."""
    if layout.size <= _SMALL:
        return layout
    for narrow in _NARROW:
        shape = tuple(
            size if axis in (0, layout.axis) else min(size, narrow)
            for axis, size in enumerate(layout.shape)
        )
        found = Layout(shape, layout.dim, layout.axis, layout.groups)
        if joined(bits, found) == joined(bits, layout):
            return found
    return layout


@lru_cache(maxsize=4096)
def _overhead(length: int, layout: Layout, bits: int, functions: bool) -> Overhead:
    # of all names, nodes repeat the length only
    names = [number.rjust(length, "x") for number in "12"]
    one, two = (_decoders(names[:count], layout, bits, functions) for count in (1, 2))
    return Overhead(_bytes(two) - _bytes(one), _shared(one))


def _shared(model: ir.Model) -> dict[str, int]:
    """Bytes of constants, of what is computed once, by the nodes named after it, of functions."""
    found: dict[str, int] = {}
    for name, value in model.graph.initializers.items():
        if name.startswith(ONCE) and value.const_value is not None:
            found[name] = _part(value.const_value)
    for node in model.graph:
        once, _, _ = str(node.outputs[0].name).rpartition("/")
        if once.startswith(ONCE):
            found[once] = found.get(once, 0) + _part(node)
    for function in model.functions.values():
        found[function.name] = _part(function)
    return found


def _decoders(names: Sequence[str], layout: Layout, bits: int, functions: bool) -> ir.Model:
    """A model that does nothing but to decode."""
    lut = np.zeros((layout.groups, 1 << bits, layout.dim), np.float16)
    palette = Palette(bits, layout, lut, np.zeros(layout.index_shape, np.uint8))
    weight = np.zeros(layout.shape, np.float32)
    values = [ir.val(name, const_value=ir.tensor(weight, name=name)) for name in names]
    nodes = [ir.node("Neg", [value]) for value in values]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 18})
    model = ir.Model(graph, ir_version=8)
    insert_decoders(model, dict.fromkeys(names, palette), functions=functions)
    for node in model.graph:
        node.name = node.name or "node_10"  # as a file's nodes are numbered
    return model


def _bytes(model: ir.Model) -> int:
    """Of the file, without LUTs and indices."""
    stored = [
        value.const_value.nbytes
        for name, value in model.graph.initializers.items()
        if not name.startswith(ONCE) and value.const_value is not None
    ]
    return len(ir.to_proto(model).SerializeToString()) - sum(stored)


def _part(part: ir.Node | ir.Function | ir.TensorProtocol) -> int:
    """Bytes in a file: with a tag, and one or two for the length."""
    count = len(ir.to_proto(part).SerializeToString())
    return count + (2 if count < 128 else 3)
