"""What is stored in files by torch, ONNX Runtime's quantizers and hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from dkm_export.comparison import compare
from dkm_export.errors import InvalidInput
from dkm_export.inspection import inspect
from dkm_export.spec import LayerRule
from dkm_exporters.onnx import OnnxExporter, OnnxOptions
from dkm_exporters.onnx.ort import OrtExporter
from tests.foreign import named, network, to_onnx
from tests.zoo import IMAGE as ZOO_IMAGE
from tests.zoo import palettize


class _Calibration(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        self._inputs: Iterator[dict[str, Any]] = iter([{name: network()[1][0].numpy()}])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._inputs, None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(tmp_path_factory.mktemp("onnx") / "net.onnx", external_data=False)


def static(plain: Path, path: Path, format: QuantFormat, per_channel: bool) -> Path:
    name = onnx.load(plain).graph.input[0].name
    quantize_static(plain, path, _Calibration(name), quant_format=format, per_channel=per_channel)
    return path


def matmul(path: Path) -> Path:
    """A product with a weight of 64 inputs and 48 outputs."""
    weight = np.random.default_rng(0).standard_normal((64, 48), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 48])],
        [numpy_helper.from_array(weight, "weight")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opsets), path)
    return path


def converted(path: Path) -> Path:
    """What ONNX Runtime makes of an ``.onnx`` file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path.with_suffix(".ort"))
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return path.with_suffix(".ort")


def test_a_file_by_torch_is_all_dense(plain: Path) -> None:
    found = inspect(plain)
    assert not found.layers
    weights = {name: x for name, x in named(found).items() if x.encoding == "float32"}
    assert {name: x.shape for name, x in weights.items()} == {
        name: tuple(tensor.shape) for name, tensor in network()[0].state_dict().items()
    }
    assert weights["hidden.weight"].nbytes == 4 * 64 * 32
    assert sum(found.totals.values()) == found.bytes == plain.stat().st_size


def test_data_beside_the_file_belongs_to_it(plain: Path, tmp_path: Path) -> None:
    path = to_onnx(tmp_path / "net.onnx", external_data=True)
    found = inspect(path)
    assert [file.name for file in found.description.files] == ["net.onnx", "net.onnx.data"]
    assert found.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert not any(change.changed for change in compare(inspect(plain), found))
    path.with_name("net.onnx.data").unlink()
    with pytest.raises(InvalidInput, match=r"net\.onnx: initializer '.*' is not in a file of its"):
        inspect(path)


def outside(path: Path, location: str, **place: int) -> None:
    proto = onnx.load(path)
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("location", "place"),
    [
        ("../secret", {}),
        ("/etc/passwd", {}),
        ("link", {}),
        ("inside", {"offset": 1}),
        ("inside", {"offset": -1, "length": 64 * 48 * 4}),
        ("inside", {"length": 1 << 60}),
        ("inside\0", {}),
        ("", {}),
    ],
)
def test_no_tensor_is_out_of_the_folder(
    location: str, place: dict[str, int], tmp_path: Path
) -> None:
    content = bytes(64 * 48 * 4)
    (tmp_path / "secret").write_bytes(content)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "inside").write_bytes(content)
    (folder / "link").symlink_to(tmp_path / "secret")
    path = matmul(folder / "net.onnx")
    outside(path, "inside")
    assert named(inspect(path))["weight"].nbytes == len(content)
    outside(matmul(path), location, **place)
    with pytest.raises(InvalidInput, match=r"net\.onnx: initializer 'weight' "):
        inspect(path)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_name_that_is_no_text_is_refused(sparse: bool, tmp_path: Path) -> None:
    values = onnx.helper.make_tensor("", TensorProto.FLOAT, (2,), [1, 2])
    indices = onnx.helper.make_tensor("", TensorProto.INT64, (2,), [0, 1])
    constant = (
        {"sparse_value": onnx.helper.make_sparse_tensor(values, indices, [2])}
        if sparse
        else {"value": values}
    )
    node = onnx.helper.make_node("Constant", [], ["mark"], **constant)
    graph = onnx.helper.make_graph([node], "net", [], [])
    path = tmp_path / "net.onnx"
    path.write_bytes(
        onnx.helper.make_model(graph).SerializeToString().replace(b"mark", b"\xff" * 4)
    )
    with pytest.raises(InvalidInput, match=r"net\.onnx: a name in it is no text"):
        inspect(path)


def test_the_dynamic_quantizer(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "dynamic.onnx"
    quantize_dynamic(plain, path, weight_type=QuantType.QInt8)
    for file in (path, converted(path)):
        found = inspect(file)
        assert {layer.encoding for layer in found.layers} == {"int8 per tensor"}
        assert {layer.value_bytes for layer in found.layers} == {32 * 27, 64 * 32, 32 * 64}
        assert all(layer.scale_bytes for layer in found.layers)
        assert sum(found.totals.values()) == file.stat().st_size


@pytest.mark.parametrize("format", list(QuantFormat))
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_static_quantizer(
    format: QuantFormat, per_channel: bool, plain: Path, tmp_path: Path
) -> None:
    found = inspect(static(plain, tmp_path / "static.onnx", format, per_channel))
    weights = [layer for layer in found.layers if layer.bits == 8]
    how, groups = ("channel", [32, 64, 32]) if per_channel else ("tensor", [1, 1, 1])
    assert {layer.encoding for layer in weights} == {f"int8 per {how}"}
    assert [layer.groups for layer in weights] == groups
    # a number or two for each group, beside the names of fields
    assert all(5 * x.groups <= x.scale_bytes <= 14 * x.groups + 16 for x in weights)
    assert {x.shape for x in weights} == {(32, 3, 3, 3), (64, 32), (32, 64)}


@pytest.mark.parametrize("format", list(QuantFormat))
@pytest.mark.parametrize("symmetric", [False, True])
def test_four_bits_in_blocks(format: QuantFormat, symmetric: bool, tmp_path: Path) -> None:
    quantizer = MatMulNBitsQuantizer(
        str(matmul(tmp_path / "net.onnx")),
        block_size=32,
        is_symmetric=symmetric,
        quant_format=format,
        op_types_to_quantize=("MatMul",),
    )
    quantizer.process()
    path = tmp_path / "blocks.onnx"
    quantizer.model.save_model_to_file(str(path))
    (layer,) = inspect(path).layers
    signed = symmetric and format is QuantFormat.QDQ
    assert layer.encoding == f"{'int4' if signed else 'uint4'} in blocks of 32"
    assert layer.bits == 4
    assert sorted(layer.shape) == [48, 64]
    assert layer.groups == 96
    assert layer.value_bytes == 48 * 64 // 2
    assert layer.scale_bytes == 4 * 96 + (0 if symmetric else 96 // 2)
    assert layer.bits_per_weight == 8 * layer.nbytes / (48 * 64)


def test_an_ort_file_stores_what_the_onnx_file_does(plain: Path, tmp_path: Path) -> None:
    copy = tmp_path / "net.onnx"
    copy.write_bytes(plain.read_bytes())
    onnx_found, ort_found = inspect(copy), inspect(converted(copy))
    weights = {name for name, x in named(onnx_found).items() if x.encoding == "float32"}
    ours, theirs = named(onnx_found), named(ort_found)
    assert weights
    assert all(ours[name] == theirs[name] for name in weights)


def test_tensors_in_subgraphs_functions_and_sparse_ones(tmp_path: Path) -> None:
    """Which no exporter here writes."""
    inner = helper.make_graph(
        [
            helper.make_node(
                "Constant", [], ["k"], value=numpy_helper.from_array(np.ones(5, np.float32))
            ),
            helper.make_node("Add", ["k", "w"], ["out"]),
        ],
        "branch",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [5])],
        [numpy_helper.from_array(np.ones(5, np.float16), "w")],
    )
    values = numpy_helper.from_array(np.ones(3, np.float32), "sparse")
    indices = numpy_helper.from_array(np.array([1, 5, 7], np.int64), "indices")
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)],
        "graph",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5])],
        [numpy_helper.from_array(np.array(["one", "two"], object), "names")],
        sparse_initializer=[helper.make_sparse_tensor(values, indices, [4, 4])],
    )
    function = helper.make_function(
        "own",
        "f",
        ["x"],
        ["z"],
        [
            helper.make_node(
                "Constant", [], ["z"], value=numpy_helper.from_array(np.ones((2, 2), np.int8))
            )
        ],
        [helper.make_opsetid("", 21)],
    )
    path = tmp_path / "net.onnx"
    path.write_bytes(helper.make_model(graph, functions=[function]).SerializeToString())
    tensors = named(inspect(path))
    sizes = {name: (x.encoding, x.shape, x.nbytes) for name, x in tensors.items()}
    assert sizes.pop("names")[:2] == ("string", (2,))
    assert sizes == {
        "k": ("float32", (5,), 20),
        "k (2)": ("float32", (5,), 20),
        "w": ("float16", (5,), 10),
        "w (2)": ("float16", (5,), 10),
        "z": ("int8", (2, 2), 4),
        "sparse": ("sparse float32", (4, 4), 12 + 24),
    }


def of_one_name(size: int) -> list[TensorProto]:
    return [
        numpy_helper.from_array(np.full((size, 8), size, np.int8), "w"),
        numpy_helper.from_array(np.full(size, 0.5, np.float32), "s"),
    ]


def test_names_are_those_of_a_graph_or_function(tmp_path: Path) -> None:
    """Of four tensors called w, three are quantized, by a scale of their own each."""
    dequantize = helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0)
    branches = [
        helper.make_graph(
            [helper.make_node("DequantizeLinear", ["w", "s"], [f"d{size}"], axis=0)],
            "branch",
            [],
            [helper.make_tensor_value_info(f"d{size}", TensorProto.FLOAT, None)],
            of_one_name(size),
        )
        for size in (2, 3)
    ]
    function = helper.make_function(
        "own",
        "f",
        [],
        ["d"],
        [
            *(
                helper.make_node("Constant", [], [name], value=tensor)
                for name, tensor in zip("ws", of_one_name(4), strict=True)
            ),
            dequantize,
        ],
        [helper.make_opsetid("", 21)],
    )
    graph = helper.make_graph(
        [
            helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1]),
            helper.make_node("Add", ["w", "s"], ["z"]),
        ],
        "graph",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        of_one_name(5),
    )
    path = tmp_path / "net.onnx"
    path.write_bytes(helper.make_model(graph, functions=[function]).SerializeToString())
    found = inspect(path)
    layers = [(x.encoding, x.shape, x.groups, x.value_bytes, x.scale_bytes) for x in found.layers]
    assert sorted(layers) == [
        ("int8 per channel", (size, 8), size, 8 * size, 4 * size) for size in (2, 3, 4)
    ]
    assert {(x.name, x.encoding, x.nbytes) for x in found.dense} == {
        ("w", "int8", 40),
        ("s", "float32", 20),
    }


@pytest.mark.parametrize("constant", [False, True])
def test_sparse_tensors_and_their_files(constant: bool, tmp_path: Path) -> None:
    values = numpy_helper.from_array(np.ones(3000, np.float32), "values")
    indices = numpy_helper.from_array(np.arange(3000), "")
    for tensor, file in ((values, "values"), (indices, "indices")):
        (tmp_path / file).write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=file)
    sparse = helper.make_sparse_tensor(values, indices, [100, 100])
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["values"], sparse_value=sparse)] if constant else [],
        "graph",
        [],
        [helper.make_tensor_value_info("values", TensorProto.FLOAT, None)],
        sparse_initializer=[] if constant else [sparse],
    )
    path = tmp_path / "net.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    found = inspect(path)
    assert [file.name for file in found.description.files] == ["net.onnx", "values", "indices"]
    (layer,) = found.layers
    assert (layer.name, layer.shape, layer.nbytes) == ("values", (100, 100), 3000 * (4 + 8))
    assert found.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


def more(tensor: TensorProto) -> None:
    tensor.dims[0] += 1


def negative(tensor: TensorProto) -> None:
    tensor.dims[:] = [-64, -48]


def many_axes(tensor: TensorProto) -> None:
    tensor.dims.extend([1 << 62] * 1000)


def no_type(tensor: TensorProto) -> None:
    tensor.data_type = 0


def strange_type(tensor: TensorProto) -> None:
    tensor.data_type = 99


@pytest.mark.parametrize("edit", [more, negative, many_axes, no_type, strange_type])
def test_a_tensor_that_is_not_what_it_says(
    edit: Callable[[TensorProto], None], tmp_path: Path
) -> None:
    path = matmul(tmp_path / "net.onnx")
    proto = onnx.load(path)
    edit(proto.graph.initializer[0])
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InvalidInput, match=r"net\.onnx: initializer 'weight' "):
        inspect(path)


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_what_is_no_model(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"net\.onnx: "):
        inspect(path)


def test_ours_are_palettes_with_their_scales(tmp_path: Path) -> None:
    model = palettize("tests.zoo:convolutions", ZOO_IMAGE, LayerRule(bits=4))
    for exporter in (OnnxExporter(), OrtExporter()):
        path = exporter.lower(model, model.build(), tmp_path, OnnxOptions())
        found = inspect(path)
        assert found.bytes == path.stat().st_size, "what no app has to ship is none of it"
        assert {x.name: x.encoding for x in found.layers} == dict.fromkeys(
            model.palettes, "palette"
        )
        for layer in found.layers:
            palette = model.palettes[layer.name]
            assert (layer.value_bytes, layer.lut_bytes) == (palette.packed.nbytes, 32)
            assert palette.difference(found.palettes[layer.name]) is None
        assert {x.name: x.scale_bytes for x in found.layers if x.scale_bytes} == {
            "stem.0.weight": 4 * 48,
            "depthwise.weight": 4 * 96,
            "up.weight": 4 * 24,
        }
        assert found.account is not None
