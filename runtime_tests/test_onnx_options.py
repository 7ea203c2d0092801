"""ONNX's settings: opsets, functions, float16 side data, dynamic axes, tensors beside the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from dkm_export.checking.check import check
from dkm_export.checking.runtime import NumericClass, Runtime
from dkm_export.checkpoint import load_checkpoint, save_checkpoint
from dkm_export.cli.main import main
from dkm_export.compress import finalize, prepare
from dkm_export.errors import DkmWarning, ExitCode, InvalidInput, Unsupported
from dkm_export.exporting.export import export
from dkm_export.palettized import InputSpec, ModelSource, PalettizedModel
from dkm_export.plugins import RUNTIMES, discover
from dkm_export.spec import CompressionSpec, LayerRule
from dkm_exporters.onnx import OnnxExporter, OnnxOptions
from dkm_runtimes.onnxruntime import OnnxRuntime, PackedOnnxRuntime
from tests.closeness import relative_l2
from tests.networks import FAMILIES, palettized
from tests.zoo import IMAGE, TOKENS, lively, palettize

IR_VERSIONS = {
    **{15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9},
    **{21: 10, 22: 10, 23: 11, 24: 12, 25: 13},
}
"""The oldest that go with each opset, and not older than functions."""

SESSIONS = ["onnxruntime", "onnxruntime-packed"]


def lower(model: PalettizedModel, folder: Path, **options: Any) -> Path:
    exporter, chosen = OnnxExporter(), OnnxOptions.model_validate(options)
    exporter.requires(model, chosen)
    return exporter.lower(model, model.build(), folder, chosen)


def families() -> Iterator[Any]:
    """Each family with the settings as they are, with functions, and with float16 side data."""
    settings: tuple[dict[str, object], ...] = ({}, {"functions": True}, {"side_data": "fp16"})
    for name in FAMILIES:
        for chosen in settings:
            usual = name in ("minilm", "unet", "gru") and not chosen
            marks = [] if usual else [pytest.mark.slow]
            kind = "-".join(f"{key}={value}" for key, value in chosen.items()) or "default"
            yield pytest.param(name, chosen, marks=marks, id=f"{name}-{kind}")


@pytest.mark.parametrize(("name", "settings"), list(families()))
def test_every_family_passes_the_check(
    name: str, settings: dict[str, object], tmp_path: Path
) -> None:
    save_checkpoint(palettized(name, 6), tmp_path / "model.dkm.safetensors")
    out = tmp_path / "out"
    export(tmp_path / "model.dkm.safetensors", ["onnx"], out, settings={"onnx": settings})
    report = check(out, runtimes=SESSIONS)
    assert report.exit_code is ExitCode.OK, report.runtimes


@pytest.fixture(scope="module")
def convolutions() -> PalettizedModel:
    rules = (LayerRule(bits=4), LayerRule(pattern="head.weight", bits=3, dim=2))
    return palettize("tests.zoo:convolutions", IMAGE, *rules)


@pytest.mark.parametrize(
    ("opset", "ir_version"),
    [
        pytest.param(opset, version, marks=[] if opset in (15, 18, 25) else [pytest.mark.slow])
        for opset, version in IR_VERSIONS.items()
    ],
)
def test_opsets(opset: int, ir_version: int, convolutions: PalettizedModel, tmp_path: Path) -> None:
    artifact = lower(convolutions, tmp_path, opset=opset)
    proto = onnx.load(artifact)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    assert proto.ir_version == ir_version
    image = convolutions.source.example_inputs()
    (output,) = OnnxRuntime().load(artifact).run({"image": image[0].numpy()})
    assert relative_l2(output, convolutions.build()(*image)) <= 1e-5


def test_an_operator_that_an_opset_does_not_have_is_named(tmp_path: Path) -> None:
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=4))
    with pytest.raises(Unsupported, match=r"opset 16 has no LayerNormalization .* 17 or more"):
        lower(model, tmp_path, opset=16)
    assert list(tmp_path.iterdir()) == []


def test_functions_are_shared_and_the_graph_is_readable(
    convolutions: PalettizedModel, tmp_path: Path
) -> None:
    proto = onnx.load(lower(convolutions, tmp_path, functions=True))
    assert {(entry.domain, entry.version) for entry in proto.opset_import} == {
        ("", 18),
        ("dkm.lut", 1),
    }
    calls = [node for node in proto.graph.node if node.domain == "dkm.lut"]
    assert len(calls) == len(convolutions.palettes)
    assert {node.op_type for node in calls} == {function.name for function in proto.functions}
    others = {node.op_type for node in proto.graph.node} - {node.op_type for node in calls}
    assert "Gather" not in others
    assert "Cast" not in others
    (head,) = [node for node in calls if node.output[0] == "head.weight"]
    assert head.op_type == "LutDequantize_3x2_24x48"
    assert list(head.input)[:2] == ["head.weight.lut", "head.weight.indices"]


def test_float16_side_data(convolutions: PalettizedModel, tmp_path: Path) -> None:
    (tmp_path / "exact").mkdir()
    exact = lower(convolutions, tmp_path / "exact")
    with pytest.warns(DkmWarning, match=r"side data changes 'output' by [\d.]+e-04 .*=fp32"):
        artifact = lower(convolutions, tmp_path, side_data="fp16")
    stored = {tensor.name: tensor for tensor in onnx.load(artifact).graph.initializer}
    for name in ("stem.0.bias", "head.bias", "stem.0.weight.scale"):
        assert stored[name].data_type == onnx.TensorProto.FLOAT16, name
    assert not [t.name for t in stored.values() if t.data_type == onnx.TensorProto.FLOAT]

    found, before = (OnnxExporter().read_palettes(path) for path in (artifact, exact))
    for name, palette in convolutions.palettes.items():
        assert palette.difference(found[name]) is None
        if (scale := before[name].scale) is not None:
            rounded = scale.astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(found[name].scale, rounded)
    image = convolutions.source.example_inputs()
    for runtime in (OnnxRuntime(), PackedOnnxRuntime()):
        (output,) = runtime.load(artifact).run({"image": image[0].numpy()})
        assert 1e-6 < relative_l2(output, convolutions.build()(*image)) < 1e-3


@pytest.mark.parametrize("runtime", list(discover(RUNTIMES).values()), ids=lambda r: str(r.name))
def test_every_runtime_knows_that_side_data_are_rounded(
    runtime: Runtime, convolutions: PalettizedModel, tmp_path: Path
) -> None:
    if runtime.target != "onnx":
        pytest.skip(f"runs {runtime.target}")
    if reason := runtime.unavailable():
        pytest.skip(reason)
    artifact = lower(convolutions, tmp_path, side_data="fp16")
    assert runtime.load(artifact).numeric_class is NumericClass.FP16_STORED


def test_side_data_beyond_float16_are_refused(
    convolutions: PalettizedModel, tmp_path: Path
) -> None:
    module = convolutions.build()
    module.get_parameter("head.bias").fill_(70000)
    with pytest.raises(Unsupported, match=r"head\.bias holds 7e\+04, .* side_data=fp32"):
        OnnxExporter().lower(convolutions, module, tmp_path, OnnxOptions(side_data="fp16"))


def test_a_dynamic_batch(convolutions: PalettizedModel, tmp_path: Path) -> None:
    artifact = lower(convolutions, tmp_path, dynamic_axes={"image": {0: "batch"}})
    graph = onnx.load(artifact).graph
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    session, reference = OnnxRuntime().load(artifact), convolutions.build()
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 5):
        image = torch.randn((size, 3, 16, 16), generator=generator)
        (output,) = session.run({"image": image.numpy()})
        assert relative_l2(output, reference(image)) <= 1e-5


def test_dynamic_sequences_of_two_inputs(tmp_path: Path) -> None:
    save_checkpoint(palettized("minilm", 6), tmp_path / "model.dkm.safetensors")
    axes = '{tokens = {0 = "batch", 1 = "sequence"}, mask = {0 = "batch", 1 = "sequence"}}'
    arguments = ["export", "--target", "onnx", str(tmp_path), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--set", f"onnx.dynamic_axes={axes}"]) == 0
    artifact = tmp_path / "out/onnx/minilm.onnx"
    (output,) = onnx.load(artifact).graph.output
    assert output.type.tensor_type.shape.dim[0].dim_param == "batch"
    reference = load_checkpoint(tmp_path / "model.dkm.safetensors").build()
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1), (2, 8), (3, 13)):
        tokens = torch.randint(64, shape, generator=generator, dtype=torch.int32)
        mask = torch.ones(shape, dtype=torch.int32)
        for runtime in (OnnxRuntime(), PackedOnnxRuntime()):
            session = runtime.load(artifact)
            (output,) = session.run({"tokens": tokens.numpy(), "mask": mask.numpy()})
            assert relative_l2(output, reference(tokens, mask)) <= 1e-5


class Pair(nn.Module):
    """Two inputs that have to be as long as each other, and an output twice as long."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = self.layer(x) + y
        return torch.cat([z, z])


PAIR = tuple(InputSpec(name=name, shape=(2, 32)) for name in ("x", "y"))


def pair() -> nn.Module:
    return lively(Pair())


def test_names_of_sizes_that_the_model_derives(tmp_path: Path) -> None:
    model = palettize(f"{__name__}:pair", PAIR, LayerRule(bits=3))
    artifact = lower(model, tmp_path, dynamic_axes={"x": {0: "rows"}, "y": {0: "rows"}})
    (output,) = onnx.load(artifact).graph.output
    assert output.type.tensor_type.shape.dim[0].dim_param == "2*rows"
    with pytest.raises(Unsupported, match="'one' and 'two' of dynamic_axes are always"):
        lower(model, tmp_path, dynamic_axes={"x": {0: "one"}, "y": {0: "two"}})


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"picture": {0: "batch"}}, "no input 'picture', the model has: image"),
        ({"image": {4: "time"}}, "'image' has no axis 4, allowed: 0 to 3"),
        ({"image": {0: "n", 1: "n"}}, "axis 1 of 'image' is called 'n' and has size 3"),
    ],
)
def test_axes_that_a_model_does_not_have(
    axes: dict[str, dict[int, str]], message: str, convolutions: PalettizedModel, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=message):
        lower(convolutions, tmp_path, dynamic_axes=axes)


def test_an_axis_that_the_model_fixes(convolutions: PalettizedModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"fixes axis 1 of 'image' to 3: .*dynamic_axes"):
        lower(convolutions, tmp_path, dynamic_axes={"image": {1: "channels"}})


class Views(nn.Module):
    """Weights that are reached through views and copies of them, and two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.turned, self.parted = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.sliced, self.detached = nn.Linear(32, 32), nn.Linear(32, 32)
        self.table = nn.Embedding(32, 32)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = x @ self.turned.weight.t()
        first, second = self.parted.weight.chunk(2)
        x = torch.tanh(torch.cat([x @ first.t(), x @ second.t()], -1))
        x = nn.functional.linear(x, self.sliced.weight[8:], self.sliced.bias[8:])
        x = nn.functional.linear(x, self.detached.weight.detach()[:, :24])
        y: Tensor = x + self.table.weight[ids] + self.table(ids) @ self.table.weight
        return y


class Frozen(nn.Module):
    """A weight that torch sees as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight.data)


VIEWED = (
    InputSpec(name="x", shape=(4, 32)),
    InputSpec(name="ids", shape=(4,), dtype="int64", high=32),
)


def views() -> nn.Module:
    return lively(Views())


def frozen() -> nn.Module:
    return lively(Frozen())


@pytest.mark.parametrize("functions", [False, True])
def test_weights_reached_through_views(functions: bool, tmp_path: Path) -> None:
    model = palettize(f"{__name__}:views", VIEWED, LayerRule(bits=3, dim=2, axis=1))
    assert len(model.palettes) == 5
    artifact = lower(model, tmp_path, functions=functions)
    shapes = [tuple(tensor.dims) for tensor in onnx.load(artifact).graph.initializer]
    assert (32, 32) not in shapes
    inputs = model.source.example_inputs()
    arrays = {spec.name: value.numpy() for spec, value in zip(VIEWED, inputs, strict=True)}
    for runtime in (OnnxRuntime(), PackedOnnxRuntime()):
        (output,) = runtime.load(artifact).run(arrays)
        assert relative_l2(output, model.build()(*inputs)) <= 1e-5


def test_a_weight_that_became_a_constant_is_refused(tmp_path: Path) -> None:
    model = palettize(f"{__name__}:frozen", VIEWED[:1], LayerRule(bits=3))
    with pytest.raises(Unsupported, match=r"torch\.export cannot trace the model"):
        lower(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


class Ends(nn.Module):
    """Transposed weights and rows of them as outputs, a batch norm over one channel, zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.turned, self.kept = nn.Linear(32, 32), nn.Linear(32, 32)
        self.last = nn.Sequential(nn.ConvTranspose2d(8, 1, 4), nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        image = self.last(x.reshape(1, 8, 4, 4))
        y = x @ self.kept.weight.permute(0, 1)
        last = self.kept.weight[torch.tensor([-1, 3, -30])]
        return self.turned.weight.t(), image, y, last, 0 * x, x.argmax(1)


def ends() -> nn.Module:
    return lively(Ends())


@pytest.mark.parametrize("side_data", ["fp32", "fp16"])
@pytest.mark.parametrize("dim", [1, 2])
def test_outputs_keep_their_names(side_data: str, dim: int, tmp_path: Path) -> None:
    module = ends()
    names = ("turned", "image", "kept", "rows", "zeros", "chosen")
    source = ModelSource(name="ends", factory=f"{__name__}:ends", inputs=VIEWED[:1], outputs=names)
    rules = CompressionSpec(rules=(LayerRule(bits=3, dim=dim),), small_layer_size=0)
    prepare(module, rules)
    model = finalize(module, source)
    artifact = lower(model, tmp_path, side_data=side_data)
    found = OnnxExporter().read_palettes(artifact)
    assert not any(p.difference(found[name]) for name, p in model.palettes.items())
    assert [output.name for output in onnx.load(artifact).graph.output] == list(names)
    (x,) = source.example_inputs()
    expected = model.build()(x)
    for runtime in (OnnxRuntime(), PackedOnnxRuntime()):
        outputs = runtime.load(artifact).run({"x": x.numpy()})
        for output, reference in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(output, reference.numpy(), rtol=2e-3, atol=2e-3)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export whose tensors lie beside the file, as if it were beyond protobuf's limit."""
    monkeypatch.setattr("dkm_exporters.onnx.artifact._LARGEST_FILE", 1000)
    monkeypatch.setattr("dkm_exporters.onnx.artifact._OUTSIDE_FROM", 100)
    save_checkpoint(palettized("unet", 6), tmp_path / "model.dkm.safetensors")
    export(tmp_path / "model.dkm.safetensors", ["onnx"], tmp_path / "out")
    return tmp_path / "out/onnx/unet.onnx"


def test_tensors_beside_the_file(outside: Path, tmp_path: Path) -> None:
    beside = outside.with_name("unet.onnx.data")
    assert beside.stat().st_size > 5000
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    files = {entry["path"] for entry in manifest["artifacts"][0]["files"]}
    assert files == {"onnx/unet.onnx", "onnx/unet.onnx.data"}
    assert check(tmp_path / "out", runtimes=SESSIONS).exit_code is ExitCode.OK
    export(tmp_path / "model.dkm.safetensors", ["onnx"], tmp_path / "again")
    assert (tmp_path / "again/onnx/unet.onnx.data").read_bytes() == beside.read_bytes()

    content = beside.read_bytes()
    beside.write_bytes(content[:-100])
    with pytest.raises(InvalidInput, match=r"is not .* in place"):
        OnnxExporter().read_palettes(outside)
    beside.unlink()
    with pytest.raises(InvalidInput, match=r"unet\.onnx\.data cannot be read"):
        OnnxExporter().read_palettes(outside)
    assert check(tmp_path / "out", runtimes=SESSIONS).exit_code is ExitCode.GATE


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../../secret", "is not in unet.onnx.data"),
        ("offset", "-1", "is not uint8"),
        ("offset", "x", "has no place"),
        ("offset", str(2**70), "is not uint8"),
        ("length", str(2**40), "is not uint8"),
    ],
)
def test_places_beside_the_file_are_not_trusted(
    key: str, value: str, message: str, outside: Path
) -> None:
    proto = onnx.load(outside, load_external_data=False)
    (tensor,) = [t for t in proto.graph.initializer if t.name == "up.weight.indices"]
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
    outside.write_bytes(proto.SerializeToString())
    with pytest.raises(InvalidInput, match=message):
        OnnxExporter().read_palettes(outside)


def test_a_small_file_cannot_claim_much_memory(outside: Path) -> None:
    """By naming one place beside the file many times."""
    proto = onnx.load(outside, load_external_data=False)
    (entry,) = proto.metadata_props
    table = json.loads(entry.value)
    parts = [t for t in proto.graph.initializer if t.name.startswith("up.weight.")]
    for number in range(400):
        table["layers"][f"up{number}"] = table["layers"]["up.weight"]
        for part in parts:
            copy = proto.graph.initializer.add()
            copy.CopyFrom(part)
            copy.name = part.name.replace("up.weight", f"up{number}")
    entry.value = json.dumps(table)
    outside.write_bytes(proto.SerializeToString())
    with pytest.raises(InvalidInput, match=r"its palettes need \d+ bytes, it has"):
        OnnxExporter().read_palettes(outside)


def test_what_stays_dense_is_listed_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skip = LayerRule(pattern="hidden.weight", skip=True)
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=4), skip)
    save_checkpoint(model, tmp_path / "model.dkm.safetensors")
    artifact = lower(model, tmp_path)
    assert main(["inspect", str(artifact), "--json"]) == 0
    dense = json.loads(capsys.readouterr().out)["dense"]
    assert dense["hidden.weight"] == {
        "shape": [96, 48],
        "dtype": "float32",
        "bytes": 4 * 96 * 48,
        "reason": "no rule asks for a palette",
    }
    assert dense["norm.bias"]["reason"] == "no layer's weight"
    assert set(dense) >= set(model.dense)
    assert main(["inspect", str(artifact)]) == 0
    assert "no rule asks for a palette" in capsys.readouterr().out


def test_looking_at_a_checkpoint_runs_no_code_of_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=4))
    source = model.source.model_copy(update={"factory": "nowhere.at_all:net"})
    save_checkpoint(replace(model, source=source), tmp_path / "model.dkm.safetensors")
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    dense = json.loads(capsys.readouterr().out)["dense"]
    assert set(dense) == set(model.dense)
    assert {entry["reason"] for entry in dense.values()} == {""}


def test_onnx_runtime_makes_one_node_of_gelu(tmp_path: Path) -> None:
    """Which it does for one order of the factors only."""
    rules = (LayerRule(bits=4),)
    artifact = lower(palettize("tests.zoo:tokens", TOKENS, *rules), tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(artifact, options, providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert "Gelu" in operators
    assert "Erf" not in operators
