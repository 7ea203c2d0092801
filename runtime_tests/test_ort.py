"""The ORT exporter: palettes bit for bit, packed in the session too; damaged files are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs import (
    Attribute,
    Graph,
    InferenceSession,
    Model,
    Node,
    Tensor,
)
from onnxruntime.tools.reduced_build_config_parser import parse_config

from dkm_export.checking.check import check
from dkm_export.checkpoint import save_checkpoint
from dkm_export.errors import InvalidInput
from dkm_export.exporting.export import export
from dkm_export.manifest import read_manifest
from dkm_export.palette import Palette
from dkm_export.palettized import InputSpec, PalettizedModel
from dkm_export.spec import LayerRule
from dkm_exporters.onnx import OnnxExporter, OnnxOptions
from dkm_exporters.onnx.ort import OrtExporter
from dkm_runtimes.onnxruntime import OnnxRuntime, OrtRuntime
from tests.zoo import IMAGE, TOKENS, palettize

REPOSITORY = Path(__file__).parents[1]
CONFIG = "convolutions.required_operators_and_types.config"
RULES = (LayerRule(bits=4), LayerRule(pattern="head.weight", bits=3, dim=2))


def lower(model: PalettizedModel, folder: Path) -> Path:
    return OrtExporter().lower(model, model.build(), folder, OnnxOptions())


def read(artifact: Path) -> dict[str, Palette]:
    return OrtExporter().read_palettes(artifact)


@pytest.fixture(scope="module")
def model() -> PalettizedModel:
    return palettize("tests.zoo:convolutions", IMAGE, *RULES)


@pytest.fixture(scope="module")
def artifact(model: PalettizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lower(model, tmp_path_factory.mktemp("ort"))


@pytest.mark.parametrize(
    ("factory", "inputs", "rules"),
    [
        ("convolutions", IMAGE, (LayerRule(bits=8), LayerRule(pattern="up.*", bits=5, dim=4))),
        ("convolutions", IMAGE, (LayerRule(bits=3, groups=4), LayerRule(pattern="head.*", bits=7))),
        ("convolutions", IMAGE, (LayerRule(bits=1), LayerRule(pattern="line.*", bits=6, dim=5))),
        ("tokens", TOKENS, (LayerRule(bits=4, dim=3), LayerRule(pattern="head.*", bits=2, axis=1))),
        ("tied", TOKENS, (LayerRule(bits=2, dim=8, axis=1),)),
    ],
)
def test_palettes_bit_for_bit_and_outputs_as_pytorch(
    factory: str, inputs: tuple[InputSpec, ...], rules: tuple[LayerRule, ...], tmp_path: Path
) -> None:
    model = palettize(f"tests.zoo:{factory}", inputs, *rules)
    artifact = lower(model, tmp_path)
    found = read(artifact)
    assert list(found) == list(model.palettes)
    in_onnx = OnnxExporter().read_palettes(
        OnnxExporter().lower(model, model.build(), tmp_path, OnnxOptions())
    )
    for name, palette in model.palettes.items():
        assert palette.difference(found[name]) is None, name
        np.testing.assert_array_equal(found[name].dense(), in_onnx[name].dense())

    generator = torch.Generator().manual_seed(1)
    values = {spec.name: spec.random(generator) for spec in inputs}
    reference = model.build()(*values.values()).numpy().astype(np.float64)
    arrays = {name: value.numpy() for name, value in values.items()}
    (output,) = OrtRuntime().load(artifact).run(arrays)
    assert np.linalg.norm(output - reference) <= 1e-5 * np.linalg.norm(reference)


def test_equal_palettes_keep_their_own_names(model: PalettizedModel, tmp_path: Path) -> None:
    palettes = dict(model.palettes)
    for name, palette in palettes.items():
        lut = np.array([[[-0.5], [0.5]]], np.float16)
        indices = np.zeros(palette.layout.shape, np.uint8)
        palettes[name] = Palette(1, type(palette.layout)(palette.layout.shape), lut, indices)
    equal = PalettizedModel(
        source=model.source, palettes=palettes, dense=model.dense, spec=model.spec
    )
    found = read(lower(equal, tmp_path))
    assert {name: p.difference(found[name]) for name, p in palettes.items()} == dict.fromkeys(
        palettes
    )


@pytest.mark.slow
def test_same_bytes_again_and_in_another_process(
    model: PalettizedModel, artifact: Path, tmp_path: Path
) -> None:
    assert lower(model, tmp_path).read_bytes() == artifact.read_bytes()
    save_checkpoint(model, tmp_path / "model.dkm.safetensors")
    script = """
from pathlib import Path
from dkm_export.checkpoint import load_checkpoint
from dkm_exporters.onnx import OnnxOptions
from dkm_exporters.onnx.ort import OrtExporter
model = load_checkpoint(Path("model.dkm.safetensors"))
OrtExporter().lower(model, model.build(), Path("elsewhere"), OnnxOptions())
"""
    (tmp_path / "elsewhere").mkdir()
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
    )
    for name in (artifact.name, CONFIG):
        again = (tmp_path / "elsewhere" / name).read_bytes()
        assert again == (artifact.parent / name).read_bytes()


def test_holds_no_paths_and_only_operators_of_onnx(artifact: Path) -> None:
    config = artifact.with_name(CONFIG)
    assert OrtExporter().files(artifact) == [artifact, config]
    for file in (artifact, config):
        for trace in (b"pkg.torch", b"site-packages", b"/tmp", str(REPOSITORY).encode()):
            assert trace not in file.read_bytes()
    assert config.read_text().startswith("# Operators and types of convolutions.ort\nai.onnx;")
    operators, _ = parse_config(str(config), enable_type_reduction=True)
    assert operators.keys() == {"ai.onnx"}
    assert {"Cast", "Gather", "Reshape", "Gemm"} <= set().union(*operators["ai.onnx"].values())


def test_grows_with_the_nodes_and_not_with_the_weights(
    model: PalettizedModel, artifact: Path, tmp_path: Path
) -> None:
    small = OnnxExporter().lower(model, model.build(), tmp_path, OnnxOptions())
    nodes = len(onnx.load(small).graph.node)
    assert artifact.stat().st_size < small.stat().st_size + 500 * nodes


@pytest.mark.parametrize(("runtime", "packed"), [(OnnxRuntime, False), (OrtRuntime, True)])
def test_weights_are_decoded_at_each_inference_only_from_ort(
    runtime: type[OnnxRuntime],
    packed: bool,
    model: PalettizedModel,
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Profiled(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.enable_profiling = True
            self.profile_file_prefix = str(tmp_path / "profile")

    monkeypatch.setattr(onnxruntime, "SessionOptions", Profiled)
    if runtime is OnnxRuntime:
        artifact = OnnxExporter().lower(model, model.build(), tmp_path, OnnxOptions())
        (tmp_path / "profile").mkdir()
    session = runtime().load(artifact)
    monkeypatch.undo()
    session.run({"image": np.zeros((1, 3, 16, 16), np.float32)})
    del session
    (profile,) = tmp_path.glob("profile_*.json")
    events = json.loads(profile.read_text())
    gathers = [e["name"] for e in events if e.get("args", {}).get("op_name") == "Gather"]
    # one for each event's start and end, and at least one for each palette
    assert len(gathers) >= len(model.palettes) if packed else not gathers


def test_check_runs_both_formats_and_hands_on_the_notes(
    model: PalettizedModel, tmp_path: Path
) -> None:
    checkpoint, out = tmp_path / "model.dkm.safetensors", tmp_path / "out"
    save_checkpoint(model, checkpoint)
    export(checkpoint, ["onnx", "ort"], out)
    _, ort = read_manifest(out).artifacts
    assert [file.path for file in ort.files] == ["ort/convolutions.ort", f"ort/{CONFIG}"]

    report = check(out, required=["onnxruntime", "onnxruntime-ort"])
    assert report.exit_code == 0, report.to_json()
    ran = {
        run.runtime: run.where
        for run in report.runtimes
        if run.status == "pass" and "under node" not in run.where
    }
    assert ran == {
        "onnxruntime": "native CPU",
        "onnxruntime-packed": "native CPU, weights packed in RAM",
        "onnxruntime-ort": "native CPU, weights decoded at each inference",
    }
    verdict, keep = report.artifacts[0].notes
    assert verdict.startswith("CoreML NeuralNetwork 8 of 11 nodes in 4 partitions, CoreML ML ")
    assert "NNAPI 10 of 11 nodes in 2 partitions: the static verdict" in verdict
    assert "onnxsim" in keep

    (out / "ort" / CONFIG).unlink()
    assert check(out / "ort" / "convolutions.ort").exit_code == 3


def test_no_verdict_without_onnx_runtime(
    model: PalettizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = OnnxExporter().lower(model, model.build(), tmp_path, OnnxOptions())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    verdict, keep = OnnxExporter().notes(exported)
    assert verdict.startswith("no verdict of ONNX Runtime's mobile usability checker: onnxruntime ")
    assert "onnxsim" in keep
    monkeypatch.undo()
    exported.write_bytes(b"nonsense")
    verdict, _ = OnnxExporter().notes(exported)
    assert verdict.startswith("no verdict of ONNX Runtime's mobile usability checker: ")
    assert "\n" not in verdict


@pytest.mark.parametrize("name", ["optimized.onnx", "optimized.ort"])
def test_a_saved_optimized_model_is_refused_with_the_reason(
    name: str, model: PalettizedModel, tmp_path: Path
) -> None:
    exported = OnnxExporter().lower(model, model.build(), tmp_path, OnnxOptions())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / name)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    exporter = OrtExporter() if name.endswith(".ort") else OnnxExporter()
    with pytest.raises(InvalidInput) as caught:
        exporter.read_palettes(tmp_path / name)
    message = str(caught.value)
    assert "initializer 'stem.0.weight.lut' is missing: ship this file as it is: onnxsim" in message
    assert message.endswith("put the weights back to full size")
    assert "\n" not in message


def test_a_changed_lut_entry_is_found_in_its_layer(
    model: PalettizedModel, artifact: Path, tmp_path: Path
) -> None:
    stored = model.palettes["line.weight"].lut.tobytes()
    content = artifact.read_bytes()
    assert content.count(stored) == 1
    path = tmp_path / "changed.ort"
    path.write_bytes(content.replace(stored, bytes([stored[0] ^ 1]) + stored[1:]))
    found = read(path)
    differing = {name: p.difference(found[name]) for name, p in model.palettes.items()}
    assert differing.pop("line.weight") == "1 of 16 LUT entries differ"
    assert set(differing.values()) == {None}


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    assert len(old) == len(new)

    def edit(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: b"", "not a file in ONNX Runtime's format"),
        (lambda content: b"garbage" * 9, "not a file in ONNX Runtime's format"),
        (lambda content: content[:5000], "malformed or cut short"),
        (replaced(b"\x03\0\0\0dkm\0", b"\x03\0\0\0dkn\0"), "no 'dkm' metadata"),
        (replaced(b'{"schema_version":1', b'{"schema_version":2'), "schema_version"),
        (replaced(b'"shape":[24,48]', b'"shape":[24,49]'), "head.weight: initializer"),
        (replaced(b"up.weight.lut", b"up.weight.bar"), "initializer 'up.weight.lut' is missing"),
        (
            replaced(b"\x0d\0\0\0up.weight.lut", b"\xff\xff\0\0up.weight.lut"),
            "malformed or cut short",
        ),
        (
            replaced(b"stem.0.weight.indices", b"stem.0.weight.indicez"),
            "initializer 'stem.0.weight.indices' is missing",
        ),
        (replaced(b"up.weight.scale", b"up.weight.\xff\xff\xff\xff\xff"), "malformed or cut short"),
    ],
)
def test_contradictions_are_refused(
    edit: Callable[[bytes], bytes], message: str, artifact: Path, tmp_path: Path
) -> None:
    path = tmp_path / "edited.ort"
    path.write_bytes(edit(artifact.read_bytes()))
    with pytest.raises(InvalidInput) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_cut_files_are_refused(artifact: Path, tmp_path: Path) -> None:
    whole = artifact.read_bytes()
    path = tmp_path / "cut.ort"
    for place in (path, tmp_path):
        with pytest.raises(InvalidInput, match="cannot be read"):
            read(place)
        with pytest.raises(InvalidInput, match="no such file"):
            OrtRuntime().load(place)
    for length in (
        *range(0, 100, 3),
        *range(1000, len(whole), 997),
        *range(len(whole) - 200, len(whole) - 3),
    ):
        path.write_bytes(whole[:length])
        for refuse in (read, OrtRuntime().load):
            with pytest.raises(InvalidInput, match=r"cut\.ort") as caught:
                refuse(path)
            assert "\n" not in str(caught.value)


def vector(builder: Any, start: Callable[[Any, int], int], offsets: Sequence[int]) -> int:
    start(builder, len(offsets))
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


def overlapping_tensors(builder: Any) -> int:
    """A graph of 10 000 tensors with the same megabyte: 10 GB."""
    data = builder.CreateByteVector(bytes(1 << 20))
    tensors = []
    for number in range(10_000):
        name = builder.CreateString(str(number))
        Tensor.Start(builder)
        Tensor.AddName(builder, name)
        Tensor.AddRawData(builder, data)
        tensors.append(Tensor.End(builder))
    initializers = vector(builder, Graph.StartInitializersVector, tensors)
    Graph.Start(builder)
    Graph.AddInitializers(builder, initializers)
    return int(Graph.End(builder))


def overlapping_graphs(builder: Any) -> int:
    """A graph of 900 times the same node, which has 900 times the same empty graph."""
    Graph.Start(builder)
    graphs = vector(builder, Attribute.StartGraphsVector, [Graph.End(builder)] * 900)
    Attribute.Start(builder)
    Attribute.AddGraphs(builder, graphs)
    attributes = vector(builder, Node.StartAttributesVector, [Attribute.End(builder)])
    Node.Start(builder)
    Node.AddAttributes(builder, attributes)
    nodes = vector(builder, Graph.StartNodesVector, [Node.End(builder)] * 900)
    Graph.Start(builder)
    Graph.AddNodes(builder, nodes)
    return int(Graph.End(builder))


@pytest.mark.parametrize("graph", [overlapping_tensors, overlapping_graphs])
def test_parts_that_overlap_are_refused_before_they_take_memory(
    graph: Callable[[Any], int], tmp_path: Path
) -> None:
    builder = flatbuffers.Builder(0)
    version = builder.CreateString("6")
    root = graph(builder)
    Model.Start(builder)
    Model.AddGraph(builder, root)
    model = Model.End(builder)
    InferenceSession.Start(builder)
    InferenceSession.AddOrtVersion(builder, version)
    InferenceSession.AddModel(builder, model)
    builder.Finish(InferenceSession.End(builder), b"ORTM")
    path = tmp_path / "overlapping.ort"
    path.write_bytes(builder.Output())
    with pytest.raises(InvalidInput, match="malformed") as caught:
        read(path)
    assert "overlap" in str(caught.value.__cause__)


def test_damaged_files_never_crash_the_reader(artifact: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.ort"
    whole = artifact.read_bytes()
    words = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\x80", b"\xff\xff\xff\x7f"]
    for number in range(300):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(damaged) // 4, 3) * 4:
            if number % 2:
                damaged[position] = rng.integers(256)
            else:
                damaged[position : position + 4] = words[rng.integers(4)]
        path.write_bytes(damaged)
        with suppress(InvalidInput):
            read(path)
