"""ONNX artifacts on runtimes beside ONNX Runtime for Python: interpreted, and under node."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
import torch
from torch import Tensor, nn

from dkm_export.checking.check import check
from dkm_export.checking.runtime import Runtime
from dkm_export.checkpoint import save_checkpoint
from dkm_export.cli.main import main
from dkm_export.compress import finalize, prepare
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.palettized import InputSpec, ModelSource, PalettizedModel
from dkm_export.spec import CompressionSpec, LayerRule
from dkm_exporters.onnx import OnnxExporter, OnnxOptions
from dkm_runtimes.node import OnnxRuntimeNode, OnnxRuntimeWeb
from dkm_runtimes.onnx_process import OnnxProcess
from dkm_runtimes.onnx_reference import OnnxReferenceRuntime
from tests.zoo import IMAGE, TOKENS, lively, palettize

NODE = (OnnxRuntimeNode, OnnxRuntimeWeb)

MIXED = {
    "stem.0": LayerRule(bits=3, dim=2, axis=1),
    "depthwise": LayerRule(bits=5),
    "up": LayerRule(bits=4, dim=4, groups=2),
    "line": LayerRule(bits=1, dim=8),
    "head": LayerRule(bits=8),
}


@pytest.fixture(params=[OnnxReferenceRuntime, *NODE], ids=lambda runtime: runtime.name)
def runtime(request: pytest.FixtureRequest) -> Runtime:
    found: Runtime = request.param()
    if reason := found.unavailable():
        pytest.skip(reason)
    return found


@pytest.fixture(params=NODE, ids=lambda runtime: runtime.name)
def node_runtime(request: pytest.FixtureRequest) -> OnnxRuntimeNode:
    found: OnnxRuntimeNode = request.param()
    if reason := found.unavailable():
        pytest.skip(reason)
    return found


def lower(model: PalettizedModel, folder: Path, module: nn.Module | None = None) -> Path:
    return OnnxExporter().lower(model, module or model.build(), folder, OnnxOptions())


def assert_near(output: npt.NDArray[Any], expected: Tensor) -> None:
    reference = expected.detach().numpy()
    assert output.dtype == reference.dtype
    assert output.shape == reference.shape
    exact = reference.astype(np.float64)
    assert np.linalg.norm(output - exact) <= 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("factory", "inputs", "rules"),
    [
        ("convolutions", IMAGE, {"": LayerRule(bits=4, dim=4)}),
        ("convolutions", IMAGE, MIXED),
        ("tokens", TOKENS, {"": LayerRule(bits=6)}),
        ("tokens", TOKENS, {"": LayerRule(bits=7, dim=3)}),
    ],
)
def test_equals_pytorch(
    factory: str,
    inputs: tuple[InputSpec, ...],
    rules: dict[str, LayerRule],
    runtime: Runtime,
    tmp_path: Path,
) -> None:
    named = [
        rule.model_copy(update={"pattern": f"{layer}.weight"}) if layer else rule
        for layer, rule in rules.items()
    ]
    model = palettize(f"tests.zoo:{factory}", inputs, *named)
    session = runtime.load(lower(model, tmp_path))
    module = model.build()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        values = {spec.name: spec.random(generator) for spec in inputs}
        (output,) = session.run({name: value.numpy() for name, value in values.items()})
        assert_near(output, module(*values.values()))


class Several(nn.Module):
    """Inputs and outputs of several types, one output of which is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 48)
        self.head = nn.Linear(48, 24)

    def forward(self, ids: Tensor, kinds: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        y = self.head(self.embedding(ids) + x)
        return y.argmax(-1), y, kinds, y > 0, y.mean()


def test_several_inputs_and_outputs_of_several_types(runtime: Runtime, tmp_path: Path) -> None:
    module = lively(Several())
    prepare(module, CompressionSpec(rules=(LayerRule(bits=4, dim=2),), small_layer_size=0))
    inputs = (
        InputSpec(name="ids", shape=(2, 5), dtype="int64", high=96),
        InputSpec(name="kinds", shape=(3,), dtype="int32", high=9),
        InputSpec(name="x", shape=(2, 5, 48)),
    )
    source = ModelSource(
        name="several",
        factory="unused:factory",
        inputs=inputs,
        outputs=("best", "y", "same", "positive", "mean"),
    )
    model = finalize(module, source)
    fresh = Several()
    fresh.load_state_dict(model.state_dict())
    session = runtime.load(lower(model, tmp_path, fresh.eval()))
    generator = torch.Generator().manual_seed(2)
    values = {spec.name: spec.random(generator) for spec in inputs}
    backwards = {name: values[name].numpy() for name in reversed(values)}
    outputs = session.run(backwards)
    expected = fresh(*values.values())
    assert len(outputs) == len(expected)
    for output, reference in zip(outputs, expected, strict=True):
        assert_near(output, reference)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rules = (LayerRule(bits=4), LayerRule(pattern="head.weight", bits=3, dim=2))
    model = palettize("tests.zoo:convolutions", IMAGE, *rules)
    return lower(model, tmp_path_factory.mktemp("onnx"))


IMAGES = {"image": np.ones(IMAGE[0].shape, np.float32)}


def test_external_data_beside_the_file(runtime: Runtime, artifact: Path, tmp_path: Path) -> None:
    (expected,) = runtime.load(artifact).run(IMAGES)
    model = tmp_path / "model.onnx"
    # tensors of shapes stay inside: ONNX Runtime infers shapes before it reads the data
    onnx.save(
        onnx.load(artifact),
        model,
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=100,
    )
    assert model.stat().st_size < artifact.stat().st_size / 2
    (output,) = runtime.load(model).run(IMAGES)
    np.testing.assert_array_equal(output, expected)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(InvalidInput, match=r"(?i)model\.onnx: .*data"):
        runtime.load(model)


def test_decoders_that_are_functions_of_the_model(runtime: Runtime, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 18, "dkm.lut" : 1]>
        decoding (float[2, 4] x) => (float[2, 3] y)
        <float[4] lut = {-1, 0, 1, 2}, uint8[12] indices = {0, 1, 2, 3, 3, 2, 1, 0, 1, 3, 0, 2},
        int64[2] shape = {4, 3}>
        {
            weight = dkm.lut.Decode (lut, indices, shape)
            y = MatMul (x, weight)
        }
        <domain: "dkm.lut", opset_import: ["" : 18]>
        Decode (lut, indices, shape) => (weight)
        {
            codes = Cast <to = 6> (indices)
            flat = Gather (lut, codes)
            weight = Reshape (flat, shape)
        }
        """
    )
    onnx.save(model, tmp_path / "decoding.onnx")
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    lut, indices = np.array([-1, 0, 1, 2]), [[0, 1, 2], [3, 3, 2], [1, 0, 1], [3, 0, 2]]
    (y,) = runtime.load(tmp_path / "decoding.onnx").run({"x": x})
    np.testing.assert_array_equal(y, x @ lut[indices])


def test_malformed_files(runtime: Runtime, artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    for content in (None, b"", b"garbage", artifact.read_bytes()[:5000]):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InvalidInput, match=r"cut\.onnx: .*: export it again$") as caught:
            runtime.load(path)
        assert "\n" not in str(caught.value)


def unknown_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].op_type = "Unheard"


def newer_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 99


@pytest.mark.parametrize(
    ("edit", "name"), [(unknown_operator, "Unheard"), (newer_opset, "(?i)opset 99")]
)
def test_what_a_runtime_lacks_is_named(
    edit: Callable[[onnx.ModelProto], None],
    name: str,
    runtime: Runtime,
    artifact: Path,
    tmp_path: Path,
) -> None:
    proto = onnx.load(artifact)
    edit(proto)
    onnx.save(proto, tmp_path / "edited.onnx")
    with pytest.raises(Unsupported, match=name) as caught:
        runtime.load(tmp_path / "edited.onnx")
    assert str(caught.value).startswith(f"{tmp_path / 'edited.onnx'}: ")
    assert " cannot run it: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "inputs",
    [{}, {"image": np.ones((1, 3, 8, 9), np.float32)}, {"image": np.ones((1, 3, 16, 16), int)}],
    ids=["none", "shape", "dtype"],
)
def test_node_goes_on_after_wrong_inputs(
    inputs: dict[str, Any], node_runtime: OnnxRuntimeNode, artifact: Path
) -> None:
    session = node_runtime.load(artifact)
    with pytest.raises(InvalidInput, match="fails on these inputs: ") as caught:
        session.run(inputs)
    assert "\n" not in str(caught.value)
    assert len(session.run(IMAGES)) == 1


def test_the_evaluator_names_the_inputs_and_the_node_where_it_fails(artifact: Path) -> None:
    session = OnnxReferenceRuntime().load(artifact)
    with pytest.raises(InvalidInput, match="takes the inputs image, got none"):
        session.run({})
    with pytest.raises(Unsupported, match=r"fails at Conv 'stem\.0/Conv': "):
        session.run({"image": np.ones((1, 2, 16, 16), np.float32)})


def test_the_evaluator_is_not_trusted_with_grouped_transposed_convolutions(tmp_path: Path) -> None:
    """It would take the bias of the first channel for all of them, without an error."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 18]>
        grouped (float[1, 2, 1] x) => (float[1, 2, 1] y)
        <float[2, 1, 1] w = {1, 1}, float[2] b = {10, 20}>
        { [up] y = ConvTranspose <group = 2> (x, w, b) }
        """
    )
    onnx.save(model, tmp_path / "grouped.onnx")
    with pytest.raises(Unsupported, match="its ConvTranspose is wrong with groups, as 'up' has"):
        OnnxReferenceRuntime().load(tmp_path / "grouped.onnx")


def process_of(session: Any) -> subprocess.Popen[bytes]:
    assert isinstance(session, OnnxProcess)
    return session._child._process


def test_no_process_is_left(
    node_runtime: OnnxRuntimeNode, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = node_runtime.load(artifact)
    process = process_of(session)
    assert process.poll() is None
    del session
    gc.collect()
    assert process.returncode is not None

    started = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> Any:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    (tmp_path / "bad.onnx").write_bytes(b"garbage")
    with pytest.raises(InvalidInput):
        node_runtime.load(tmp_path / "bad.onnx")
    assert [process.returncode is not None for process in started] == [True]


def test_node_ends_by_itself_when_python_is_gone(
    node_runtime: OnnxRuntimeNode, artifact: Path
) -> None:
    session = node_runtime.load(artifact)
    process = process_of(session)
    assert process.stdin is not None
    process.stdin.close()  # as the system does for a Python that was killed
    assert process.wait(timeout=30) == 0


def test_a_process_that_dies_is_an_error(node_runtime: OnnxRuntimeNode, artifact: Path) -> None:
    session = node_runtime.load(artifact)
    process_of(session).kill()
    for _ in range(2):
        with pytest.raises(InvalidInput, match=f"{node_runtime.name}: node ended with code -9"):
            session.run(IMAGES)


def test_a_package_that_does_not_load(
    node_runtime: OnnxRuntimeNode,
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Unsupported, match=f"{node_runtime.name} does not load: Cannot find"):
        node_runtime.load(artifact)
    node = tmp_path / "bin" / "node"
    node.parent.mkdir()
    node.write_text("#!/bin/sh\necho too old >&2\nexit 3\n")
    node.chmod(0o755)
    monkeypatch.setenv("PATH", str(node.parent))
    with pytest.raises(Unsupported, match=r"does not load: .*: node ended with code 3: too old"):
        node_runtime.load(artifact)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    model = palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=4))
    save_checkpoint(model, folder / "model.dkm.safetensors")
    arguments = ("export", "--target", "onnx", str(folder / "model.dkm.safetensors"))
    assert main([*arguments, "-o", str(folder / "out"), "-q"]) == 0
    return folder / "out"


def test_the_check_runs_them(runtime: Runtime, export: Path) -> None:
    report = check(export, runtimes=[runtime.name], required=[runtime.name])
    assert report.exit_code == 0, report
    (ran,) = report.runtimes
    assert ran.status == "pass"
    assert ran.where == runtime.where


def test_a_slow_runtime_runs_only_when_it_is_named(export: Path) -> None:
    name = OnnxReferenceRuntime.name

    def finding(**named: list[str]) -> Any:
        report = check(export, **named)  # type: ignore[arg-type]
        (ran,) = (runtime for runtime in report.runtimes if runtime.runtime == name)
        return ran

    idle = finding()
    assert idle.status == "not_run"
    assert idle.findings[0].message.endswith(f": --require {name} runs it")
    assert finding(required=[name]).status == "pass"
    assert finding(runtimes=[name]).status == "pass"


def test_a_runtime_that_is_not_installed_is_not_run(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    report = check(export, required=[OnnxRuntimeWeb.name])
    assert report.exit_code == 4
    assert report.missing == [f"runtime {OnnxRuntimeWeb.name} did not run"]
    (finding,) = next(
        runtime.findings for runtime in report.runtimes if runtime.runtime == OnnxRuntimeWeb.name
    )
    assert finding.message == f"not installed: dkm runtimes install {OnnxRuntimeWeb.name}"
    assert list(tmp_path.glob("dkm-export")) == []


@pytest.mark.parametrize("runtime", NODE, ids=lambda runtime: runtime.name)
def test_npm_installs_a_runtime_that_runs(
    runtime: type[OnnxRuntimeNode],
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        runtime().install(print)
    except Unsupported as error:
        signs = ("PATH", "ENOTFOUND", "ECONN", "EAI_AGAIN", "ETIMEDOUT", "network")
        if not any(sign in str(error) for sign in signs):
            raise
        pytest.skip(str(error))
    assert runtime().unavailable() is None
    assert len(runtime().load(artifact).run(IMAGES)) == 1
    # the script that downloads libraries for CUDA did not run
    assert not list(tmp_path.rglob("*cuda*.so"))
