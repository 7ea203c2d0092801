"""Decoders of ONNX graphs: every palette, kind of layer, form and way to open a session."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from dkm_export.palette import MAX_DIM, Layout, Palette
from dkm_exporters.onnx import OnnxExporter, OnnxOptions
from dkm_exporters.onnx.artifact import write_artifact
from dkm_exporters.onnx.decoding import insert_decoders
from dkm_exporters.onnx.packing import joined
from dkm_exporters.onnx.tracing import trace
from dkm_runtimes.onnxruntime import OnnxRuntime, PackedOnnxRuntime
from tests.kinds import KINDS, Kinds
from tests.zoo import lively

LAYOUTS = {
    "scalars": Layout((24, 16, 3, 3)),
    "bytes": Layout((64, 128)),
    "vectors": Layout((24, 16, 3, 3), dim=4),
    "input_axis": Layout((24, 16, 3, 3), dim=8, axis=1),
    "last_axis": Layout((64, 128), dim=8, axis=1),
    "padded": Layout((25, 16, 3), dim=4),
    "padded_inside": Layout((12, 5, 3, 3), dim=2, axis=1),
    "padded_last": Layout((7, 5), dim=3, axis=1),
    "uneven": Layout((7, 3, 3)),
    "uneven_large": Layout((67, 71)),
    "groups": Layout((24, 16, 3, 3), groups=8),
    "byte_groups": Layout((64, 512), groups=4),
    "uneven_groups": Layout((12, 3, 3), groups=4),
    "group_vectors": Layout((64, 512), dim=4, groups=2),
    "group_columns": Layout((24, 10), dim=4, axis=1, groups=3),
    "padded_rows": Layout((23, 16), dim=4),
    "widest": Layout((MAX_DIM, 300), dim=MAX_DIM),
    "one": Layout((1,)),
    # large enough for a LUT of several vectors at once, whatever the bits
    "large": Layout((96, 256)),
    "large_groups": Layout((128, 512), groups=2),
    "large_vectors": Layout((256, 128, 2, 2), dim=2),
    "large_group_vectors": Layout((128, 512, 2, 2), dim=2, groups=2),
    "large_rest": Layout((255, 128, 3, 3), dim=4),
    "large_odd": Layout((151, 151)),
    "large_rows": Layout((1024, 36)),
}
TABLES = {name: layout for name, layout in LAYOUTS.items() if len(layout.shape) == 2}
"""Layouts whose rows can be looked up."""

FORMS = (False, True)
"""Whether decoders are functions."""


def random_palette(bits: int, layout: Layout, seed: int, scaled: bool = False) -> Palette:
    rng = np.random.default_rng(seed)
    lut = rng.normal(size=(layout.groups, 1 << bits, layout.dim)).astype(np.float16)
    lut.reshape(-1)[:4] = np.array([-0.0, 6e-8, 65504, -65504], np.float16)[: lut.size]
    indices = rng.integers(0, 1 << bits, layout.index_shape, dtype=np.uint8)
    scale = None
    if scaled:
        shape = (layout.shape[0], *[1] * (len(layout.shape) - 1))
        scale = rng.normal(size=shape).astype(np.float32)
    return Palette(bits, layout, lut, indices, scale)


def dense(palettes: Mapping[str, Palette]) -> dict[str, ir.Value]:
    """An initializer for each weight, which is not decoded yet."""
    zeros = {name: np.zeros(palette.layout.shape, np.float32) for name, palette in palettes.items()}
    return {
        name: ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in zeros.items()
    }


def model_of(
    nodes: Mapping[str, ir.Node], weights: Mapping[str, ir.Value], inputs: Sequence[ir.Value] = ()
) -> ir.Model:
    """A graph that returns what ``nodes`` give, by the names of its outputs."""
    for name, node in nodes.items():
        node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.FLOAT
    graph = ir.Graph(
        inputs,
        [node.outputs[0] for node in nodes.values()],
        nodes=nodes.values(),
        initializers=list(weights.values()),
        opset_imports={"": 18},
        name="weights",
    )
    return ir.Model(graph, ir_version=8)


def returning_weights(palettes: Mapping[str, Palette]) -> ir.Model:
    """A graph without inputs that returns the weights, still dense."""
    weights = dense(palettes)
    nodes = {f"out_{name}": ir.node("Identity", [value]) for name, value in weights.items()}
    for (name, palette), node in zip(palettes.items(), nodes.values(), strict=True):
        node.outputs[0].shape = ir.Shape(palette.layout.shape)
        node.name = name
    return model_of(nodes, weights)


def looking_up(palettes: Mapping[str, Palette], ids: ir.Value) -> ir.Model:
    """A graph that takes row numbers and returns these rows of each weight, still dense."""
    weights = dense(palettes)
    nodes = {f"out_{name}": ir.node("Gather", [value, ids]) for name, value in weights.items()}
    for (name, palette), node in zip(palettes.items(), nodes.values(), strict=True):
        node.outputs[0].shape = ir.Shape([*(ids.shape or ()), palette.layout.shape[1]])
        node.name = f"{name}/Gather"
    return model_of(nodes, weights, [ids])


def transposing(palettes: Mapping[str, Palette]) -> ir.Model:
    """A graph without inputs that returns each weight transposed, from two nodes."""
    weights = dense(palettes)
    turns = [
        ir.node("Transpose", [value], {"perm": [1, 0]}, name=f"{name}/{number}")
        for name, value in weights.items()
        for number in (1, 2)
    ]
    nodes = {f"out_{node.name}": ir.node("Identity", node.outputs) for node in turns}
    for name, node in nodes.items():
        node.name = f"{name}/Identity"
        (value,) = node.inputs
        assert value is not None
        value.name = f"{name}/turned"
        shape = palettes[name.split("_", 1)[1].rpartition("/")[0]].layout.shape
        node.outputs[0].shape = ir.Shape(shape[::-1])
    model = model_of(nodes, weights)
    model.graph.insert_before(model.graph[0], turns)
    return model


def ways(artifact: Path, inputs: Mapping[str, Any]) -> Iterator[list[npt.NDArray[Any]]]:
    """The outputs with decoders folded, with weights packed, and without any optimization."""
    yield OnnxRuntime().load(artifact).run(inputs)
    yield PackedOnnxRuntime().load(artifact).run(inputs)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(artifact, options, providers=["CPUExecutionProvider"])
    yield session.run(None, dict(inputs))


def written(
    model: ir.Model, palettes: Mapping[str, Palette], folder: Path, functions: bool
) -> Path:
    """The file of a model whose decoders are inserted here."""
    ties = {"tied.weight": "embedding.weight"}
    turned = insert_decoders(model, palettes, ties, functions=functions)
    write_artifact(model, palettes, folder / "model.onnx", OnnxOptions(), turned=turned)
    found = OnnxExporter().read_palettes(folder / "model.onnx")
    assert list(found) == list(palettes)
    for name, palette in palettes.items():
        assert palette.difference(found[name]) is None, name
        np.testing.assert_array_equal(found[name].dense(), palette.dense())
    return folder / "model.onnx"


@pytest.mark.parametrize(("bits", "functions"), list(product(range(1, 9), FORMS)))
def test_decodes_every_layout_bit_for_bit(bits: int, functions: bool, tmp_path: Path) -> None:
    palettes = {
        name: random_palette(bits, layout, seed, scaled=seed % 3 == 0)
        for seed, (name, layout) in enumerate(LAYOUTS.items())
    }
    artifact = written(returning_weights(palettes), palettes, tmp_path, functions)
    for outputs in ways(artifact, {}):
        for output, (name, palette) in zip(outputs, palettes.items(), strict=True):
            assert output.tobytes() == palette.dense().tobytes(), name


@pytest.mark.parametrize(("bits", "functions"), list(product(range(1, 9), FORMS)))
@pytest.mark.parametrize(("dtype", "shape"), [("int64", (2, 3)), ("int32", (5,)), ("int64", ())])
def test_looks_up_rows_bit_for_bit(
    bits: int, functions: bool, dtype: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    palettes = {
        name: random_palette(bits, layout, seed)
        for seed, (name, layout) in enumerate(TABLES.items())
    }
    ids = ir.val("ids", ir.DataType[dtype.upper()], ir.Shape(shape))
    artifact = written(looking_up(palettes, ids), palettes, tmp_path, functions)
    rows = np.random.default_rng(0).integers(-7, 7, shape, dtype=dtype)
    for outputs in ways(artifact, {"ids": rows}):
        for output, (name, palette) in zip(outputs, palettes.items(), strict=True):
            assert output.tobytes() == palette.dense()[rows].tobytes(), name


@pytest.mark.parametrize(("bits", "functions"), list(product(range(1, 9), FORMS)))
def test_what_is_used_transposed_is_stored_transposed(
    bits: int, functions: bool, tmp_path: Path
) -> None:
    palettes = {
        name: random_palette(bits, layout, seed, scaled=seed % 2 == 0)
        for seed, (name, layout) in enumerate(TABLES.items())
    }
    artifact = written(transposing(palettes), palettes, tmp_path, functions)
    table = json.loads(onnx.load(artifact).metadata_props[0].value)
    assert table["transposed"] == [n for n, p in palettes.items() if p.layout.groups == 1]
    for outputs in ways(artifact, {}):
        for index, (name, palette) in enumerate(palettes.items()):
            for output in outputs[2 * index : 2 * index + 2]:
                np.testing.assert_array_equal(output, palette.dense().T, name)


def test_only_the_rows_that_are_looked_up_are_decoded(tmp_path: Path) -> None:
    """No initializer of an optimized graph, and no value of it, has the size of the weight."""
    for functions, (bits, layout) in product(
        FORMS, product((3, 4), (Layout((4096, 32)), Layout((4096, 36), dim=4)))
    ):
        palettes = {"table": random_palette(bits, layout, 0)}
        ids = ir.val("ids", ir.DataType.INT64, ir.Shape([2]))
        artifact = written(looking_up(palettes, ids), palettes, tmp_path, functions)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(artifact, options, providers=["CPUExecutionProvider"])
        graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "optimized.onnx")).graph
        sizes = [len(tensor.raw_data) for tensor in graph.initializer]
        assert max(sizes) == palettes["table"].packed.nbytes
        assert sum(sizes) < palettes["table"].nbytes + 16_000  # tables of bytes


class _Matrix:
    """The graph of `Kinds`, traced once, and the same layers in torch."""

    def __init__(self) -> None:
        self.module = lively(Kinds()).requires_grad_(False)
        (self.tokens,) = KINDS.example_inputs()
        traced = trace(self.module, (self.tokens,), KINDS, OnnxOptions())
        self._traced = ir.to_proto(traced).SerializeToString()

    def palettes(self, bits: int, dim: int, groups: int, axis: int) -> dict[str, Palette]:
        """A random palette for each weight that such a layout fits."""
        found = {}
        generator = np.random.default_rng(bits + 10 * dim)
        for name, weight in self.module.named_parameters():
            shape = tuple(weight.shape)
            if len(shape) < 2:
                continue
            layout = Layout(shape, dim, axis, groups)
            size = (groups, 1 << bits, dim)
            lut = generator.normal(0, (2 / weight[0].numel()) ** 0.5, size).astype(np.float16)
            indices = generator.integers(0, 1 << bits, layout.index_shape, dtype=np.uint8)
            found[name] = Palette(bits, layout, lut, indices)
        return found

    def graph(self) -> ir.Model:
        model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(self._traced))
        return model

    def expected(self, palettes: Mapping[str, Palette]) -> list[npt.NDArray[Any]]:
        for name, palette in palettes.items():
            self.module.get_parameter(name).copy_(torch.from_numpy(palette.dense()))
        return [output.numpy() for output in self.module(self.tokens)]


@pytest.fixture(scope="module")
def matrix() -> _Matrix:
    return _Matrix()


# 8 bits x 4 dims x 2 axes x 3 groups x 2 forms, in three sessions each
@pytest.mark.slow
@pytest.mark.parametrize("functions", FORMS, ids=("inlined", "functions"))
@pytest.mark.parametrize(("bits", "dim"), list(product(range(1, 9), (1, 2, 4, 8))))
def test_every_kind_of_layer_computes_what_torch_computes(
    bits: int, dim: int, functions: bool, matrix: _Matrix, tmp_path: Path
) -> None:
    for axis, groups in product((0, 1), (1, 2, 3)):
        if axis == 0 and groups > 1 and 24 // groups % dim:
            continue  # a vector cannot be in two groups
        palettes = matrix.palettes(bits, dim, groups, axis)
        assert len(palettes) == 11
        artifact = written(matrix.graph(), palettes, tmp_path, functions)
        expected = matrix.expected(palettes)
        for outputs in ways(artifact, {"tokens": matrix.tokens.numpy()}):
            for output, reference in zip(outputs, expected, strict=True):
                error = np.linalg.norm(output.astype(np.float64) - reference)
                assert error <= 1e-5 * np.linalg.norm(reference.astype(np.float64))


def test_large_layouts_are_looked_up_several_vectors_at_once() -> None:
    """So the test above covers that, for every number of bits."""
    for bits in range(1, 8):
        found = {name for name, layout in LAYOUTS.items() if joined(bits, layout) > 1}
        assert {name for name in LAYOUTS if name.startswith("large")} - {"large_odd"} <= found
        assert "large_odd" not in found
        assert "uneven" not in found
