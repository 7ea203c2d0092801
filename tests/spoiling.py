"""Faults to put into artifacts: constants, and the instructions around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from dkm_export.files import files_below
from dkm_export.palette import Palette
from dkm_exporters.executorch.program import ProgramFile
from dkm_exporters.executorch.xnnpack import read_graph, replace_graph
from tests.mlpackages import edit_model, operations

Array = npt.NDArray[Any]
Spoil = Callable[[Path], None]
"""Changes an artifact in place."""


def replace_constant(folder: Path, before: Array, after: Array) -> None:
    """Change a constant wherever it is stored in the files of a folder, which is one place."""
    found = 0
    for file in files_below(folder):
        data = file.read_bytes()
        for dtype in {before.dtype, np.dtype(np.float16), np.dtype(np.float32)}:
            old, new = before.astype(dtype).tobytes(), after.astype(dtype).tobytes()
            found += data.count(old)
            data = data.replace(old, new)
        file.write_bytes(data)
    assert found == 1


def change_entry(artifact: Path, palette: Palette) -> None:
    """Change the LUT entry that most weights use."""
    changed = palette.lut.copy()
    entry = np.bincount(palette.indices.reshape(palette.layout.groups, -1)[0]).argmax()
    changed[0, entry] = changed[0, entry] * np.float16(1.25) + np.float16(0.01)
    replace_constant(artifact.parent, palette.lut, changed)


def in_onnx(edit: Callable[[onnx.GraphProto], None]) -> Spoil:
    """Edit the graph of an ONNX file."""

    def spoiled(artifact: Path) -> None:
        model = onnx.load(artifact)
        edit(model.graph)
        artifact.write_bytes(model.SerializeToString())

    return spoiled


def initializer(graph: onnx.GraphProto, name: str) -> onnx.TensorProto:
    tensor: onnx.TensorProto
    (tensor,) = [tensor for tensor in graph.initializer if tensor.name == name]
    return tensor


def changed(name: str, change: Callable[[Array], Array]) -> Spoil:
    """Replace the values of an ONNX initializer."""

    def edit(graph: onnx.GraphProto) -> None:
        tensor = initializer(graph, name)
        values = change(numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))

    return in_onnx(edit)


def padding_in_coreml(artifact: Path) -> None:
    """Shift the third convolution of a package, which pads by two, by two rows."""

    def edit(spec: Any) -> None:
        made = {operation.outputs[0].name: operation for operation in operations(spec)}
        third = [operation for operation in operations(spec) if operation.type == "conv"][2]
        pad = made[third.inputs["pad"].arguments[0].name].attributes["val"]
        assert list(pad.immediateValue.tensor.ints.values) == [2, 2, 2, 2]
        pad.immediateValue.tensor.ints.values[:] = [4, 0, 2, 2]

    edit_model(artifact, edit)


def padding_in_xnnpack(artifact: Path) -> None:
    """Shift the first depthwise convolution of a program, which pads by two, by two rows."""

    def edit(graph: Any) -> None:
        node = next(n for n in graph["xnodes"] if n["xnode_union_type"] == "XNNDepthwiseConv2d")
        node["xnode_union"].update(padding_top=4, padding_bottom=0)

    in_xnnpack(edit)(artifact)


def in_xnnpack(edit: Callable[[Any], None]) -> Spoil:
    """Edit the first graph that a program has for XNNPACK."""

    def spoiled(artifact: Path) -> None:
        file = ProgramFile(artifact)
        processed = file.delegate("forward", 0)
        graph = read_graph(processed)
        edit(graph)
        file.set_delegate("forward", 0, replace_graph(processed, graph))
        artifact.write_bytes(file.to_bytes())

    return spoiled
