"""Artifacts on aarch64 Linux, emulated, where those runtimes are installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from dkm_export.checking.check import check
from dkm_export.checking.execution import check_runtime
from dkm_export.checking.gates import Gates
from dkm_export.checking.reference import make_reference
from dkm_export.checking.runtime import Runtime
from dkm_export.checkpoint import save_checkpoint
from dkm_export.cli.main import main
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.palettized import InputSpec, PalettizedModel
from dkm_export.plugins import EXPORTERS, discover
from dkm_export.samples import make_samples
from dkm_export.spec import LayerRule
from dkm_runtimes.aarch64.emulator import EmulatedRuntime
from dkm_runtimes.aarch64.executorch import ExecuTorchAarch64
from dkm_runtimes.aarch64.onnxruntime import OnnxRuntimeAarch64
from tests.zoo import CASES, IMAGE, palettize

pytestmark = pytest.mark.slow
RUNTIMES = (OnnxRuntimeAarch64, ExecuTorchAarch64)
IMAGES = {"image": np.ones(IMAGE[0].shape, np.float32)}


@pytest.fixture(params=RUNTIMES, ids=lambda runtime: runtime.name)
def runtime(request: pytest.FixtureRequest) -> EmulatedRuntime:
    found: EmulatedRuntime = request.param()
    if reason := found.unavailable():
        pytest.skip(reason)
    return found


@pytest.fixture
def onnx_runtime() -> OnnxRuntimeAarch64:
    found = OnnxRuntimeAarch64()
    if reason := found.unavailable():
        pytest.skip(reason)
    return found


def lower(model: PalettizedModel, runtime: Runtime, folder: Path) -> Path:
    exporter = discover(EXPORTERS)[runtime.target]
    artifact: Path = exporter.lower(model, model.build(), folder, exporter.options())
    return artifact


@pytest.mark.parametrize(("factory", "inputs", "rules"), CASES.values(), ids=CASES)
def test_equals_pytorch(
    factory: str,
    inputs: tuple[InputSpec, ...],
    rules: tuple[LayerRule, ...],
    runtime: EmulatedRuntime,
    tmp_path: Path,
) -> None:
    model = palettize(f"tests.zoo:{factory}", inputs, *rules)
    session = runtime.load(lower(model, runtime, tmp_path))
    module = model.build()
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        values = [spec.random(generator) for spec in inputs]
        names = [spec.name for spec in inputs]
        arrays = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        (output,) = session.run(arrays)
        expected = module(*values).detach().numpy()
        assert output.dtype == expected.dtype
        assert output.shape == expected.shape
        error = np.linalg.norm(output - expected.astype(np.float64))
        assert 0 < error <= 1e-5 * np.linalg.norm(expected)  # another CPU sums in another order


def test_one_changed_entry_of_a_table_fails(runtime: EmulatedRuntime, tmp_path: Path) -> None:
    model = palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=4))
    samples = make_samples(model.build(), model.source, None)
    reference = make_reference(model, samples, None)
    statuses = []
    for shift in (0, 0.05):
        palette = model.palettes["stem.0.weight"]
        lut = palette.lut.copy()
        lut[0, 7] += shift
        palettes = {**model.palettes, "stem.0.weight": replace(palette, lut=lut)}
        folder = tmp_path / str(shift)
        folder.mkdir()
        artifact = lower(replace(model, palettes=palettes), runtime, folder)
        report = check_runtime(artifact, runtime, reference, Gates())
        assert report.where == "aarch64 Linux, emulated"
        assert report.version is not None
        assert report.version.startswith(f"{runtime.name} {runtime.version}, qemu ")
        statuses.append([(finding.check, finding.status.value) for finding in report.findings])
    assert statuses[0] == [("fidelity", "pass"), ("negative control", "pass")]
    assert statuses[1][0] == ("fidelity", "fail")


def test_a_check_runs_them_when_they_are_named(runtime: EmulatedRuntime, tmp_path: Path) -> None:
    model = palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=4))
    file, out = tmp_path / "model.dkm.safetensors", tmp_path / "out"
    save_checkpoint(model, file)
    assert main(["export", "--target", runtime.target, str(file), "-o", str(out), "-q"]) == 0
    (idle,) = (found for found in check(out).runtimes if found.runtime == runtime.name)
    assert idle.status == "not_run"
    reason = f"{runtime.only_named}: --require {runtime.name} runs it"
    assert [finding.message for finding in idle.findings] == [reason]
    report = check(out, runtimes=[runtime.name], required=[runtime.name])
    assert report.exit_code == 0
    assert [found.status for found in report.runtimes] == ["pass"]


def test_outputs_of_other_types_and_shapes(
    onnx_runtime: OnnxRuntimeAarch64, tmp_path: Path
) -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 18]>
        several (float[2, 3] x, int64[2] n) =>
            (int64[2, 1] best, float sum, bool[2] any, int64[2] n2)
        {
            best = ArgMax <axis = 1> (x)
            sum = ReduceSum <keepdims = 0> (x)
            any = Greater (n, n)
            n2 = Add (n, n)
        }
        """
    )
    onnx.save(model, tmp_path / "several.onnx")
    session = onnx_runtime.load(tmp_path / "several.onnx")
    x, n = np.array([[1, 3, 2], [6, 5, 4]], np.float32), np.array([1, 2])
    best, total, any_, twice = session.run({"n": n, "x": x})
    assert best.tolist() == [[1], [0]]
    assert (total.tolist(), total.shape) == (21, ())
    assert any_.tolist() == [False, False]
    assert twice.tolist() == [2, 4]
    assert [x.dtype.name for x in (best, total, any_)] == ["int64", "float32", "bool"]
    with pytest.raises(InvalidInput, match="fails on these inputs: ") as caught:
        session.run({"x": x})
    assert "\n" not in str(caught.value)
    assert len(session.run({"n": n, "x": x})) == 4


def test_what_onnx_runtime_refuses(onnx_runtime: OnnxRuntimeAarch64, tmp_path: Path) -> None:
    model = palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=4))
    artifact = lower(model, onnx_runtime, tmp_path)
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(artifact.read_bytes()[:5000])
    proto = onnx.load(artifact)
    proto.graph.node[0].op_type = "Unheard"
    other = tmp_path / "other.onnx"
    onnx.save(proto, other)
    with pytest.raises(InvalidInput, match=r"cut\.onnx: .*: export it again$"):
        onnx_runtime.load(cut)
    with pytest.raises(InvalidInput, match=r"missing\.onnx: there is no such file"):
        onnx_runtime.load(tmp_path / "missing.onnx")
    with pytest.raises(Unsupported, match=r"other\.onnx: .* cannot run it: .*Unheard") as caught:
        onnx_runtime.load(other)
    assert "\n" not in str(caught.value)


def test_a_program_that_the_runner_refuses(tmp_path: Path) -> None:
    runtime = ExecuTorchAarch64()
    if reason := runtime.unavailable():
        pytest.skip(reason)
    model = palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=4))
    artifact = lower(model, runtime, tmp_path)
    session = runtime.load(artifact)
    with pytest.raises(InvalidInput, match="the runner fails: input 0 is "):
        session.run({"image": np.ones((1, 3, 16, 17), np.float32)})
    assert len(session.run(IMAGES)) == 1
    artifact.write_bytes(artifact.read_bytes()[:2000])
    with pytest.raises(InvalidInput):
        runtime.load(artifact)


def test_apt_and_pip_install_a_runtime_that_runs(
    runtime: EmulatedRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once more, where it could be installed before; elsewhere this would wait for a network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        runtime.install(print)
    except Unsupported as error:
        signs = ("Failed to fetch", "Could not find a version", "PATH", "is aarch64 itself")
        if not any(sign in str(error) for sign in signs):
            raise
        pytest.skip(str(error))
    assert runtime.unavailable() is None
    model = palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=4))
    artifact = lower(model, runtime, tmp_path)
    assert len(runtime.load(artifact).run(IMAGES)) == 1
    # nothing of it is for the place where it was made
    moved = (tmp_path / "dkm-export").rename(tmp_path / "elsewhere")
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    moved.rename(tmp_path / "other" / "dkm-export")
    assert len(runtime.load(artifact).run(IMAGES)) == 1
