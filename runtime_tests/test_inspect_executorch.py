"""What is stored in programs that ExecuTorch made without us, and in ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import flatbuffers
import pytest
import torch
from torch import Tensor, nn

from dkm_export.checkpoint import save_checkpoint
from dkm_export.comparison import SAME, compare
from dkm_export.errors import InvalidInput
from dkm_export.inspection import Inspection, inspect
from dkm_export.spec import LayerRule
from dkm_exporters.executorch import ExecuTorchExporter, ExecuTorchOptions
from dkm_exporters.executorch.options import Backend
from tests.foreign import encodings, network
from tests.zoo import IMAGE, TOKENS, palettize

pytest.importorskip("executorch")
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.exir import ExecutorchBackendConfig, to_edge, to_edge_transform_and_lower

from dkm_exporters.executorch.program import ProgramFile
from dkm_exporters.executorch.xnnpack import read_graph
from dkm_exporters.executorch.xnnpack_graph import read_constants


class Tokens(nn.Module):
    """An embedding and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 64)
        self.hidden, self.head = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.hidden(self.embedding(tokens))))
        return y


def written(program: Any, path: Path, **options: Any) -> Path:
    made = program.to_executorch(ExecutorchBackendConfig(**options))
    path.write_bytes(made.buffer)
    return path


def exported() -> Any:
    return torch.export.export(*network())


def xnnpack(program: Any) -> Any:
    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])


def sizes(found: Inspection) -> list[tuple[str, tuple[int, ...], int]]:
    return [(x.encoding, x.shape, x.nbytes) for x in found.description.tensors]


DENSE = [
    ("float32", (32, 3, 3, 3), 3456),
    ("float32", (32,), 128),
    ("float32", (64, 32), 8192),
    ("float32", (64,), 256),
    ("float32", (32, 64), 8192),
    ("float32", (32,), 128),
]
"""The network, as PyTorch's channels are ordered."""


def test_constants_of_a_portable_program(tmp_path: Path) -> None:
    path = written(to_edge(exported()), tmp_path / "net.pte")
    found = inspect(path)
    assert sizes(found) == DENSE
    assert [x.name for x in found.description.tensors] == [f"constant {i}" for i in range(1, 7)]
    assert sum(found.totals.values()) == found.bytes == path.stat().st_size
    assert not found.description.unread


def test_constants_of_xnnpack(tmp_path: Path) -> None:
    found = inspect(written(xnnpack(exported()), tmp_path / "net.pte"))
    assert sizes(found) == DENSE, "square kernels look the same in XNNPACK's order"
    assert {x.name for x in found.dense} == {
        f"forward/delegate {part}/node {node}/{role}"
        for part, node in ((0, 1), (1, 0), (1, 1))
        for role in ("weight", "bias")
    }


def test_a_weight_that_two_layers_share_counts_once(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.back = (
                nn.Linear(a, b) for a, b in ((32, 64), (32, 64), (64, 32))
            )
            self.second.load_state_dict(self.first.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.back(self.first(x)))
            return y

    program = torch.export.export(Twice(), (torch.randn(1, 32),))
    found = inspect(written(xnnpack(program), tmp_path / "net.pte"))
    assert sum(x.value_bytes for x in found.dense) == 8192 + 256 + 8192 + 128
    shared = [x.reason for x in found.dense if x.reason]
    assert len(shared) == 2
    assert all(reason.startswith("the same bytes as forward/delegate 0/node") for reason in shared)


@pytest.mark.parametrize("per_channel", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_quantized_by_pt2e(per_channel: bool, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer()
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=per_channel))
    prepared = prepare_pt2e(exported().module(), quantizer)
    prepared(*network()[1])
    program = torch.export.export(convert_pt2e(prepared), network()[1])
    found = inspect(written(xnnpack(program), tmp_path / "net.pte"))
    weights = [x for x in found.layers if x.bits == 8]
    how, groups = ("channel", [32, 64, 32]) if per_channel else ("tensor", [1, 1, 1])
    assert [x.encoding for x in weights] == [f"int8 per {how}"] * 3
    assert [x.value_bytes for x in weights] == [864, 2048, 2048]
    assert [x.groups for x in weights] == groups
    assert [x.scale_bytes for x in weights] == ([4 * n for n in groups] if per_channel else [0] * 3)


@pytest.mark.parametrize("block", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_quantized_by_torchao(block: int, tmp_path: Path) -> None:
    """8da4w: activations of 8 bits, weights of 4."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = Tokens().eval()
    quantize_(
        model,
        Int8DynamicActivationIntxWeightConfig(
            weight_dtype=getattr(torch, "int4"),  # noqa: B009 mypy does not know it
            weight_granularity=PerGroup(block),
        ),
    )
    program = torch.export.export(model, (torch.zeros(1, 4, dtype=torch.long),))
    found = inspect(written(xnnpack(program), tmp_path / "net.pte"))
    assert list(encodings(found).values()) == [
        (f"int4 in blocks of {block}", 4, 1, 64 * 64 // block),
        (f"int4 in blocks of {block}", 4, 1, 32 * 64 // block),
    ]
    assert [x.value_bytes for x in found.layers] == [64 * 64 // 2, 32 * 64 // 2]
    assert [x.scale_bytes for x in found.layers] == [2 * x.groups for x in found.layers]
    assert found.dense[0].shape == (20, 64)


@pytest.mark.parametrize("bits", [8, 16])
def test_quantized_for_portable_kernels(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("executorch.kernels.quantized")
    import executorch.kernels.quantized  # noqa: F401 registers operators
    from executorch.exir import EdgeCompileConfig

    dtype, least, most = getattr(torch, f"int{bits}"), -(1 << bits - 1), (1 << bits - 1) - 1

    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randint(least, most, (32, 64), dtype=dtype))
            self.register_buffer("scales", torch.rand(32))
            self.register_buffer("zeros", torch.zeros(32, dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            weight: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(
                self.weight, self.scales, self.zeros, 0, least, most, dtype
            )
            return x @ weight.T

    program = torch.export.export(Quantized(), (torch.randn(1, 64),))
    edge = to_edge(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    (layer,) = inspect(written(edge, tmp_path / "net.pte")).description.tensors
    assert (layer.encoding, layer.bits, layer.groups) == (f"int{bits} per channel", bits, 32)
    assert layer.shape == (32, 64)
    assert (layer.value_bytes, layer.scale_bytes) == (32 * 64 * bits // 8, 32 * (4 + 8))


def test_weights_in_another_file_are_said_to_be_there(tmp_path: Path) -> None:
    program = to_edge(exported())
    path = written(program, tmp_path / "net.pte", external_constants=True)
    assert (b"eh00" in path.read_bytes()) is False, "a program without segments has no header"
    found = inspect(path)
    assert {x.name: x.shape for x in found.dense} == {
        name: tuple(tensor.shape) for name, tensor in network()[0].state_dict().items()
    }
    assert {(x.nbytes, x.reason) for x in found.dense} == {(0, "in another file")}
    assert found.description.unread == {"constants in another file": None}
    assert found.account is None


@pytest.mark.slow
def test_what_a_delegate_for_core_ml_has(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    program = to_edge_transform_and_lower(exported(), partitioner=[CoreMLPartitioner()])
    path = written(program, tmp_path / "net.pte")
    found = inspect(path)
    half = [("float16", shape, size // 2) for _, shape, size in DENSE]
    assert sizes(found) == half
    assert {x.name for x in found.dense} >= {"forward/delegate 0/p_conv_weight_to_fp16"}


def test_what_is_for_an_unknown_backend_is_not_taken_apart(tmp_path: Path) -> None:
    path = written(xnnpack(exported()), tmp_path / "net.pte")
    data = path.read_bytes()
    assert data.count(b"XnnpackBackend") == 2
    path.write_bytes(data.replace(b"XnnpackBackend", b"UnheardBackend"))
    found = inspect(path)
    file = ProgramFile(path)
    unread = found.description.unread
    for index in range(2):
        blob = unread[f"forward/delegate {index}, for UnheardBackend"]
        assert blob == len(file.delegate("forward", index))
    named_data = {key: x for key, x in unread.items() if key.startswith("data named")}
    assert sum(filter(None, named_data.values())) == sum(size for _, _, size in DENSE)
    assert sum(found.totals.values()) == found.bytes
    assert found.account is None


def test_values_that_buffers_have_at_first(tmp_path: Path) -> None:
    from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass

    class Counting(nn.Module):
        state: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.arange(100.0))

        def forward(self, x: Tensor) -> Tensor:
            self.state.add_(x)
            y: Tensor = self.state * 2
            return y

    program = to_edge(torch.export.export(Counting(), (torch.ones(100),)))
    passes = [InitializedMutableBufferPass(["state"])]
    found = inspect(written(program, tmp_path / "net.pte", passes=passes))
    assert found.description.unread == {"values that buffers have at first": 400}


@pytest.mark.parametrize(
    "backend",
    ["xnnpack-lut", "portable"]
    + [pytest.param(x, marks=pytest.mark.slow) for x in ("xnnpack-ptd", "coreml")],
)
def test_ours_have_the_palettes_of_the_checkpoint_and_what_is_dense(
    backend: Backend, tmp_path: Path
) -> None:
    rules = (LayerRule(bits=4), LayerRule(pattern="head.weight", bits=2, dim=2))
    model = palettize("tests.zoo:convolutions", IMAGE, *rules)
    save_checkpoint(model, tmp_path / "model.dkm.safetensors")
    options = ExecuTorchOptions(backend=backend)
    artifact = ExecuTorchExporter().lower(model, model.build(), tmp_path, options)
    before, after = inspect(tmp_path / "model.dkm.safetensors"), inspect(artifact)
    changes = {x.name: x for x in compare(before, after) if x.is_layer}
    assert {name: x.palette for name, x in changes.items()} == dict.fromkeys(model.palettes, SAME)
    assert not after.description.unread
    assert after.account is not None
    assert sum(after.totals.values()) == after.bytes
    dense = {x.name: (x.shape, x.nbytes) for x in after.dense}
    if backend.startswith("xnnpack"):
        assert dense == {
            f"bias beside {name}": (model.dense[bias].shape, model.dense[bias].nbytes)
            for name in model.palettes
            for bias in [name.replace("weight", "bias").replace("depthwise.bias", "norm.bias")]
        }
        assert {x.name: x.scale_bytes for x in after.layers if x.scale_bytes} == {
            "stem.0.weight": 192,
            "depthwise.weight": 384,
            "up.weight": 96,
        }
    elif backend == "portable":
        biases: list[tuple[int, ...]] = [(24,), (24,), (48,), (48,), (96,)]
        scales: list[tuple[int, ...]] = [(1, 24, 1, 1), (48, 1, 1, 1), (96, 1, 1, 1)]
        shapes = sorted(shape for shape, _ in dense.values())
        assert shapes == sorted(biases + scales)
    else:
        names = {name.rpartition("/")[2] for name in dense}
        assert names >= {"p_head_bias_to_fp16", "b_norm_running_var_to_fp16"}


def test_data_with_two_names_counts_once(tmp_path: Path) -> None:
    path = written(xnnpack(exported()), tmp_path / "net.pte")
    file = ProgramFile(path)
    named = file._program.named_data
    named += [replace(entry, key=f"{entry.key} again") for entry in named]
    path.write_bytes(file.to_bytes())
    found = inspect(path)
    assert sizes(found) == DENSE
    assert not found.description.unread
    path.write_bytes(path.read_bytes().replace(b"XnnpackBackend", b"UnheardBackend"))
    unread = inspect(path).description.unread
    named_data = [x for key, x in unread.items() if key.startswith("data named")]
    assert sum(filter(None, named_data)) == sum(size for _, _, size in DENSE)


def test_a_bias_that_two_delegates_have_counts_once(tmp_path: Path) -> None:
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=4))
    path = ExecuTorchExporter().lower(model, model.build(), tmp_path, ExecuTorchOptions())
    before = inspect(path)
    file = ProgramFile(path)
    delegates = file.plan("forward").delegates
    delegates.append(replace(delegates[0]))
    # other bytes, the same content
    file.set_delegate("forward", len(delegates) - 1, file.delegate("forward", 0) + bytes(16))
    path.write_bytes(file.to_bytes())
    after = inspect(path)
    assert after.totals["dense tensors"] == before.totals["dense tensors"]
    (again,) = (x.reason for x in after.dense if not x.nbytes)
    assert again.startswith("the same bytes as bias beside ")


def test_segments_that_overlap_are_refused(tmp_path: Path) -> None:
    path = written(xnnpack(exported()), tmp_path / "net.pte")
    file = ProgramFile(path)
    end = max(segment.offset + segment.size for segment in file._program.segments)
    for segment in file._program.segments:
        segment.offset, segment.size = 0, end
    path.write_bytes(file.to_bytes())
    with pytest.raises(InvalidInput, match=r"net\.pte: the program is malformed") as caught:
        inspect(path)
    assert "segments overlap" in str(caught.value.__cause__)


def xnnpack_part(shape: list[int], size: int) -> bytes:
    """A graph with one constant."""
    builder = flatbuffers.Builder(0)
    builder.StartVector(4, len(shape), 4)
    for axis in reversed(shape):
        builder.PrependUint32(axis)
    sizes = builder.EndVector()
    builder.StartObject(7)
    builder.PrependUOffsetTRelativeSlot(2, sizes, 0)
    builder.PrependUint32Slot(3, 1, 0)
    tensor = builder.EndObject()
    builder.StartObject(2)
    builder.PrependUint8Slot(0, 1, 0)
    builder.PrependUOffsetTRelativeSlot(1, tensor, 0)
    value = builder.EndObject()
    builder.StartVector(4, 1, 4)
    builder.PrependUOffsetTRelative(value)
    values = builder.EndVector()
    builder.StartObject(3)
    builder.PrependUint64Slot(1, size, 0)
    entry = builder.EndObject()
    builder.StartVector(4, 2, 4)
    for _ in range(2):  # the first stands for none
        builder.PrependUOffsetTRelative(entry)
    entries = builder.EndVector()
    builder.StartObject(9)
    builder.PrependUOffsetTRelativeSlot(2, values, 0)
    builder.PrependUOffsetTRelativeSlot(8, entries, 0)
    builder.Finish(builder.EndObject())
    graph, start = bytes(builder.Output()), XNNHeader.EXPECTED_LENGTH
    header = XNNHeader(start, len(graph), start + len(graph), size)
    return b"".join((header.to_bytes(), graph, bytes(size)))


@pytest.mark.parametrize("shape", [[1 << 31] * 5000, [1] * 65, [2, 33]])
def test_a_shape_of_xnnpack_fits_its_bytes(shape: list[int]) -> None:
    (constant,) = read_constants(xnnpack_part([2, 32], 8))
    assert (constant.shape, constant.place.size) == ((2, 32), 8)
    with pytest.raises(ValueError, match="too many axes, or more values than bits"):
        read_constants(xnnpack_part(shape, 8))


def test_a_graph_is_read_as_flatc_reads_it(tmp_path: Path) -> None:
    """Whose JSON has the names of the schema."""
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=4))
    artifact = ExecuTorchExporter().lower(model, model.build(), tmp_path, ExecuTorchOptions())
    foreign = written(xnnpack(exported()), tmp_path / "net.pte")
    for path in (artifact, foreign):
        file = ProgramFile(path)
        for index in range(len(file.plan("forward").delegates)):
            processed = file.delegate("forward", index)
            graph = read_graph(processed)
            values = [value["xvalue_union"] for value in graph["xvalues"]]
            tensors = [value.get("tensor_value", value) for value in values]
            constants = [x for x in tensors if x["constant_buffer_idx"]]
            found = read_constants(processed)
            assert [(x.number, list(x.shape)) for x in found] == [
                (x["id_out"], x["dims"]) for x in constants
            ]
            entries = [graph["constant_data"][x["constant_buffer_idx"]] for x in constants]
            assert [(x.place.key, x.place.size) for x in found] == [
                (x["named_key"], x["size"]) for x in entries
            ]
            nodes = [node["xnode_union"] for node in graph["xnodes"]]
            weights = {node["filter_id"] for node in nodes if "filter_id" in node}
            assert {x.number for x in found if x.role == "weight"} == weights


def shared_parts(count: int) -> bytes:
    """A program of ``count`` operators, which are all the same one with a name of 4 kB."""
    builder = flatbuffers.Builder(0)
    name = builder.CreateString("x" * 4096)
    builder.StartObject(2)
    builder.PrependUOffsetTRelativeSlot(0, name, 0)
    operator = builder.EndObject()
    builder.StartVector(4, count, 4)
    for _ in range(count):
        builder.PrependUOffsetTRelative(operator)
    operators = builder.EndVector()
    builder.StartObject(10)
    builder.PrependUOffsetTRelativeSlot(6, operators, 0)
    plan = builder.EndObject()
    builder.StartVector(4, 1, 4)
    builder.PrependUOffsetTRelative(plan)
    plans = builder.EndVector()
    builder.StartObject(2)
    constants = builder.EndObject()
    builder.StartObject(8)
    builder.PrependUOffsetTRelativeSlot(1, plans, 0)
    builder.PrependUOffsetTRelativeSlot(5, constants, 0)
    builder.Finish(builder.EndObject(), file_identifier=b"ET12")
    return bytes(builder.Output())


def test_a_small_file_cannot_claim_to_be_large(tmp_path: Path) -> None:
    path = tmp_path / "net.pte"
    path.write_bytes(shared_parts(50_000))  # 200 kB, which claim to be 200 MB
    with pytest.raises(InvalidInput, match=r"net\.pte: the program is malformed") as caught:
        inspect(path)
    assert "parts of the file overlap" in str(caught.value.__cause__)


def test_what_a_program_leaves_out_is_empty(tmp_path: Path) -> None:
    """As the runtime takes it; this one has neither values nor delegates nor offsets."""
    path = tmp_path / "net.pte"
    path.write_bytes(shared_parts(1))
    found = inspect(path)
    assert not found.description.tensors
    assert found.totals["graph, names, headers"] == found.bytes
