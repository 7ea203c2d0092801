"""The whole path as a user walks it: compress, export to all targets, check on every runtime."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
import xmlschema
from safetensors.numpy import load_file

import dkm_models
from dkm_export.checking.execution import check_runtime
from dkm_export.checking.gates import Gates
from dkm_export.checking.reference import make_reference
from dkm_export.checking.report import report_schema
from dkm_export.checkpoint import load_checkpoint, save_checkpoint
from dkm_export.cli.main import main
from dkm_export.errors import InvalidInput
from dkm_export.files import files_below
from dkm_export.palettized import BatchNorm, InputSpec
from dkm_export.samples import load_samples
from dkm_export.spec import LayerRule
from dkm_export.task import Split
from dkm_exporters.onnx import OnnxExporter
from dkm_models.digits import Digits
from dkm_runtimes.coreml import CoreMLRuntime
from dkm_runtimes.onnxruntime import OnnxRuntime
from tests.commands import Dkm
from tests.compiler import needs_compiler
from tests.zoo import IMAGE, ROW, TOKENS, palettize

RECIPES = Path(dkm_models.__path__[0]) / "recipes"
RUNTIMES = ("onnxruntime", "onnxruntime-ort", "executorch", "executorch-runner", "coreml-reference")
pytestmark = needs_compiler
LAYER = "features.10.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shortly trained digits network."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    short = ("train.epochs=4", "train.batch_size=128", "dkm.epochs=1", "dkm.batch_size=256")
    settings = [part for setting in short for part in ("--set", setting)]
    assert main(["compress", str(RECIPES / "digits.toml"), "-o", str(folder), "-q", *settings]) == 0
    return folder


@pytest.fixture(scope="module")
def export(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "out"
    assert main(["export", "--target", "all", str(run), "-o", str(folder), "-q"]) == 0
    return folder


@pytest.fixture
def copy(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "out"))


def test_every_runtime_agrees_with_pytorch(dkm: Dkm, export: Path, tmp_path: Path) -> None:
    junit = tmp_path / "report.xml"
    code, report = dkm("check", export, "--require", ",".join(RUNTIMES), "--junit", junit)
    assert code == 0
    runtimes = {entry["runtime"]: entry for entry in report["runtimes"]}
    for name in RUNTIMES:
        assert runtimes[name]["status"] == "pass"
        assert abs(runtimes[name]["metric"] - report["metrics"]["hard"]) < 0.5
    assert runtimes["coreml"]["status"] in ("not_run", "pass")
    for artifact in report["artifacts"]:
        assert report["fp32_bytes"] > 8 * artifact["bytes"]
    suites = {suite.get("name") for suite in ElementTree.parse(junit).getroot()}
    assert suites > set(RUNTIMES)
    code, report = dkm("check", export, "--junit", junit)
    assert (code, report["error"]["exit_code"]) == (2, 2)


def test_the_same_export_twice_gives_the_same_bytes(
    dkm: Dkm, run: Path, export: Path, tmp_path: Path
) -> None:
    code, again = dkm("export", "--target", "all", run, "-o", tmp_path / "again")
    assert code == 0
    assert again["manifest"] == json.loads((export / "manifest.json").read_text())


def test_inspect_reads_every_kind_of_file(dkm: Dkm, run: Path, export: Path) -> None:
    _, expected = dkm("inspect", run)
    for artifact in json.loads((export / "manifest.json").read_text())["artifacts"]:
        code, found = dkm("inspect", export / artifact["path"])
        assert code == 0
        # the list of operators beside an .ort file is for a build of the runtime, not for an app
        shipped = [file for file in artifact["files"] if not file["path"].endswith(".config")]
        assert found["bytes"] == sum(file["bytes"] for file in shipped)
        for layer in found["layers"].values():
            layer["scale_bytes"] = 0  # of a batch norm, in the formats that make it a scale
        assert found["layers"] == expected["layers"]
        assert not found["not_taken_apart"]


@pytest.mark.parametrize(
    "target",
    [
        "onnx",
        *(
            pytest.param(target, marks=pytest.mark.slow)
            for target in ("coreml", "ort", "executorch", "model.dkm.safetensors")
        ),
    ],
)
def test_one_changed_lut_entry_fails_and_is_named(dkm: Dkm, copy: Path, target: str) -> None:
    lut = load_checkpoint(copy / "model.dkm.safetensors").palettes[LAYER].lut
    encodings = [lut.tobytes(), lut.astype(np.float32).tobytes()]
    changed = 0
    for file in files_below(copy / target):
        data = file.read_bytes()
        for stored in encodings:
            if stored in data:
                # flip the lowest mantissa bit of one entry
                entry = bytearray(stored)
                entry[-len(stored) // lut.size] ^= 1
                file.write_bytes(data.replace(stored, bytes(entry)))
                changed += 1
    assert changed == 1
    code, report = dkm("check", copy)
    assert code == 3
    failures = [
        finding["message"]
        for artifact in report["artifacts"]
        for finding in artifact["findings"]
        if finding["status"] == "fail"
    ]
    # of ExecuTorch's packed weights the hash is wrong, which says no more than the layer
    found = f"{LAYER}: " + ("the packed weight" if target == "executorch" else "1 of")
    assert any(found in message for message in failures), failures


def test_a_single_artifact_can_be_checked(dkm: Dkm, export: Path) -> None:
    code, report = dkm("check", export / "onnx" / "digits_cnn.onnx")
    assert code == 0
    assert [entry["target"] for entry in report["artifacts"]] == ["onnx"]
    code, report = dkm("check", export / "samples.safetensors")
    assert code == 2
    assert "is no artifact" in report["error"]["message"]


def test_a_required_runtime_that_cannot_run(
    dkm: Dkm, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CoreMLRuntime, "unavailable", lambda self: "no Mac")
    code, report = dkm("check", export, "--runtime", "coreml-reference", "--require", "coreml")
    assert code == 4
    assert report["missing"] == ["runtime coreml did not run"]
    assert {run["runtime"]: run["status"] for run in report["runtimes"]} == {
        "coreml": "not_run",
        "coreml-reference": "pass",
    }


def test_nothing_passes_without_having_run(
    dkm: Dkm, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = export / "onnx" / "digits_cnn.onnx"
    code, report = dkm("check", file, "--runtime", "executorch")
    assert code == 2
    assert "runs executorch artifacts, and here are only: onnx" in report["error"]["message"]
    assert dkm("check", file, "--runtime", ",")[0] == 2
    monkeypatch.setattr(OnnxRuntime, "unavailable", lambda self: "not installed")
    code, report = dkm("check", file, "--runtime", "onnxruntime")
    assert (code, report["missing"]) == (4, ["no runtime ran the onnx artifact"])
    monkeypatch.undo()
    monkeypatch.setattr(OnnxExporter, "unavailable", lambda self: "not installed")
    code, report = dkm("check", file)
    assert (code, report["missing"]) == (4, ["the palettes of the onnx artifact were not read"])


def test_device_tests(dkm: Dkm, copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    command = ("check", copy / "coreml" / "digits_cnn.mlpackage", "--device-test", folder)
    assert dkm(*command)[0] == 0
    written = {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in files_below(folder)
    }
    assert sorted(written) == [
        "coreml/DigitsCnnSamples.bin",
        "coreml/DigitsCnnSamples.json",
        "coreml/DigitsCnnTests.swift",
        "coreml/README.md",
        "device_test.json",
    ]
    samples = load_file(copy / "samples.safetensors")
    assert written["coreml/DigitsCnnSamples.bin"] == (
        samples["input.image"].tobytes() + samples["output.logits"].tobytes()
    )
    manifest = json.loads((copy / "manifest.json").read_text())
    origin = json.loads(written["device_test.json"])
    assert origin["checkpoint_sha256"] == manifest["checkpoint"]["sha256"]

    code, report = dkm(*command)
    assert (code, "pass --force" in report["error"]["message"]) == (2, True)
    (folder / "device_test.json").write_text("{}")
    assert dkm(*command, "--force")[0] == 0
    assert (folder / "device_test.json").read_bytes() == written["device_test.json"]
    (folder / "coreml" / "README.md").unlink()
    (copy / "coreml" / "digits_cnn.mlpackage" / "Manifest.json").write_text("{}")
    assert dkm(*command, "--force")[0] == 2
    assert len(files_below(folder)) == 4


@pytest.mark.slow
def test_device_tests_that_cannot_be_written(dkm: Dkm, export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    code, report = dkm("check", export, "--runtime", "onnxruntime", "--device-test", folder)
    assert code == 4
    assert report["error"]["message"].startswith("no runtime in use writes a device test for ")
    code, report = dkm("check", export, "--device-test", export / "tests")
    assert (code, "lies in an export: name a folder" in report["error"]["message"]) == (2, True)
    code, report = dkm("check", export, "--device-test", folder, "--max-drop", "-100")
    assert code == 3
    folder.mkdir()
    (folder / "precious").write_text("data")
    code, report = dkm("check", export, "--device-test", folder, "--force")
    assert (code, "remove it first" in report["error"]["message"]) == (2, True)
    assert [file.name for file in folder.iterdir()] == ["precious"]


def test_a_budget_for_the_accuracy(dkm: Dkm, export: Path) -> None:
    file = export / "onnx" / "digits_cnn.onnx"
    assert dkm("check", file, "--max-drop", "100")[0] == 0
    code, report = dkm("check", file, "--max-drop", "-100")
    assert code == 3
    assert [finding["check"] for finding in report["reference"]][-1] == "accuracy"


def _failures(report: dict[str, Any]) -> list[str]:
    suites = [report["reference"], *(entry["findings"] for entry in report["artifacts"])]
    suites += [entry["findings"] for entry in report["runtimes"]]
    return [
        finding["message"] for suite in suites for finding in suite if finding["status"] == "fail"
    ]


def test_a_limit_in_a_file_turns_a_check_red(dkm: Dkm, export: Path, tmp_path: Path) -> None:
    file = export / "onnx" / "digits_cnn.onnx"
    gates = tmp_path / "gates.toml"
    gates.write_text("[limits.fp32]\nrelative_l2 = 2e-5\n")
    code, report = dkm("check", file, "--runtime", "onnxruntime", "--gates", gates)
    assert (code, _failures(report)) == (0, [])
    gates.write_text("[limits.fp32]\nrelative_l2 = 1e-12\n")
    code, report = dkm("check", file, "--runtime", "onnxruntime", "--gates", gates)
    assert code == 3
    fidelity, localisation, predictions = _failures(report)
    assert localisation.startswith("first wrong layer: ")
    assert fidelity.startswith("logits: relative L2 ")
    assert fidelity.endswith(" exceeds 1e-12 (gates.toml)")
    assert predictions.startswith("over the test split: relative L2 ")
    (runtime,) = report["runtimes"]
    assert runtime["limits"] == {
        "relative_l2": 1e-12,
        "rtol": 1e-4,
        "atol": 1e-5,
        "sqnr_db": 100,
        "sources": {
            "relative_l2": "gates.toml",
            "rtol": "built-in",
            "atol": "built-in",
            "sqnr_db": "built-in",
        },
    }
    assert runtime["predictions"]["relative_l2"] > 1e-12


def test_a_budget_for_the_bytes(dkm: Dkm, export: Path, tmp_path: Path) -> None:
    gates = tmp_path / "gates.toml"
    gates.write_text('require = ["onnxruntime"]\n[max_bytes]\nonnx = 1000\n')
    only = (export / "onnx" / "digits_cnn.onnx", "--runtime", "onnxruntime", "--no-data")
    code, report = dkm("check", *only, "--gates", gates)
    (artifact,) = report["artifacts"]
    message = f"{artifact['bytes']:,} B, at most 1,000 B (gates.toml)"
    assert (code, _failures(report)) == (3, [message])
    assert artifact["max_bytes"] == {"value": 1000, "source": "gates.toml"}
    # the command line wins, and cannot name what is not there
    code, report = dkm("check", *only, "--gates", gates, "--max-bytes", "onnx=1MB")
    assert (code, report["required"]) == (0, ["onnxruntime"])
    code, report = dkm("check", *only, "--gates", gates, "--max-bytes", "1kB")
    assert (code, _failures(report)[0].endswith("at most 1,000 B (command line)")) == (3, True)
    code, report = dkm("check", *only, "--max-bytes", "onyx=1MB")
    assert (code, report["error"]["message"]) == (
        2,
        "command line: max_bytes is set for 'onyx', and the artifacts here are: onnx",
    )


def test_what_a_pipeline_reads(
    dkm: Dkm, export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    schema = json.loads(report_schema())
    junit, summary = tmp_path / "new" / "junit.xml", tmp_path / "new" / "summary.md"
    outputs = ("--junit", junit, "--summary", summary)
    code, report = dkm("check", export, "--no-data", *outputs)
    assert code == 0
    jsonschema.validate(report, schema)
    manifest = json.loads((export / "manifest.json").read_text())
    assert [artifact["files"] for artifact in report["artifacts"]] == [
        artifact["files"] for artifact in manifest["artifacts"]
    ]
    valid = xmlschema.XMLSchema(Path(__file__).parents[1] / "tests" / "data" / "junit.xsd")
    valid.validate(str(junit))
    before = summary.read_text()
    assert before.startswith("## digits\\_cnn: passed\n")
    # a failed gate writes its reports too, and a summary is added to the one that is there
    only = (export / "onnx" / "digits_cnn.onnx", "--runtime", "onnxruntime", "--no-data", "--force")
    code, report = dkm("check", *only, *outputs, "--max-bytes", "1kB")
    assert code == 3
    jsonschema.validate(report, schema)
    valid.validate(str(junit))
    assert summary.read_text().startswith(before)
    assert summary.read_text().count("## digits\\_cnn: ") == 2
    assert "## digits\\_cnn: failed (exit code 3)" in summary.read_text()
    for form, start in (
        ("github", f"::error file={only[0]},title=dkm%3A onnx file%3A size::fail: "),
        ("xcode", f"{only[0]}: error: onnx file: size: fail: "),
    ):
        command = ["check", *map(str, only), "--max-bytes", "1kB", "--format", form]
        assert main(command) == 3
        first, *others = capfd.readouterr().out.splitlines()
        assert first.startswith(start)
        assert all("error" not in line.split(":")[:3] for line in others)
    code, report = dkm("check", *only, "--summary", export / "summary.md")
    assert (code, "lies in an export: name a file outside" in report["error"]["message"]) == (
        2,
        True,
    )


@pytest.mark.slow
def test_the_pipelines_of_the_documentation(export: Path, tmp_path: Path) -> None:
    pipelines = Path(__file__).parents[1] / "docs" / "pipelines"
    shutil.copytree(export, tmp_path / "model")
    place = Path(sys.executable).parent
    variables = {
        "PATH": f"{place}{os.pathsep}{os.environ['PATH']}",
        "DKM": place / "dkm",
        "SRCROOT": tmp_path,
        "DERIVED_FILE_DIR": tmp_path / "derived",
        "GITHUB_STEP_SUMMARY": tmp_path / "summary.md",
    }
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    block = re.search(r"run: >-\n((?: {10}.*\n)+)", (pipelines / "github.yml").read_text())
    assert block
    workflow = ("bash", "-e", "-c", " ".join(block[1].split()))
    gates = tmp_path / "gates.toml"
    for command, junit, line in (
        (workflow, tmp_path / "dkm.xml", "::error file="),
        ((pipelines / "xcode.sh",), tmp_path / "derived" / "dkm.xml", f"{tmp_path}/model/onnx/"),
    ):
        for text, code in (('require = ["onnxruntime"]', 0), ("max_bytes = { onnx = 9 }", 3)):
            gates.write_text(text)
            junit.unlink(missing_ok=True)
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == code, done.stderr
            assert ElementTree.parse(junit).getroot().tag == "testsuites"
        assert done.stdout.startswith(line)
        assert "9 B (gates.toml)" in done.stdout.splitlines()[0]
    assert (tmp_path / "summary.md").read_text().count("## digits\\_cnn: ") == 2


def test_device_tests_hold_the_limits_of_the_file(dkm: Dkm, export: Path, tmp_path: Path) -> None:
    gates, folder = tmp_path / "gates.toml", tmp_path / "tests"
    gates.write_text("[limits.fp16]\nsqnr_db = 30\n")
    package = export / "coreml" / "digits_cnn.mlpackage"
    options = ("--gates", gates, "--device-test", folder, "--no-data")
    assert dkm("check", package, *options)[0] == 0
    layout = json.loads((folder / "coreml" / "DigitsCnnSamples.json").read_text())
    assert (layout["limits"]["sqnrDB"], layout["limits"]["rtol"]) == (30, 0.01)


def test_a_manifest_that_describes_something_else(dkm: Dkm, copy: Path) -> None:
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["contents"]["fp32_bytes"] *= 2
    file.write_text(json.dumps(manifest))
    code, report = dkm("check", copy / "onnx" / "digits_cnn.onnx")
    assert code == 3
    message = report["reference"][1]["message"]
    assert message == "the manifest's 'fp32_bytes' is not the checkpoint's"


def test_files_that_are_not_what_was_exported(dkm: Dkm, copy: Path) -> None:
    (copy / "onnx" / "digits_cnn.onnx").write_bytes(b"nonsense")
    (copy / "executorch" / "digits_cnn.pte").unlink()
    code, report = dkm("check", copy, "--runtime", "onnxruntime,executorch")
    assert code == 3
    assert [runtime["status"] for runtime in report["runtimes"]] == ["error"] * 2


def test_stale_samples_are_noticed(dkm: Dkm, copy: Path) -> None:
    file = copy / "samples.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x40
    file.write_bytes(bytes(data))
    code, report = dkm("check", copy, "--runtime", "onnxruntime")
    assert code == 3
    assert [finding["status"] for finding in report["reference"]] == ["fail", "pass", "fail"]


def test_a_cut_checkpoint_is_wrong_input(dkm: Dkm, copy: Path) -> None:
    file = copy / "model.dkm.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, report = dkm("check", copy)
    assert code == 2
    assert "cut short" in report["error"]["message"]


@pytest.mark.parametrize(
    ("factory", "inputs", "batch_norm"),
    [
        ("convolutions", IMAGE, "separate"),
        ("convolutions", IMAGE, "fold-before-training"),
        ("tokens", TOKENS, "separate"),
        ("arithmetic", ROW, "separate"),
    ],
)
def test_networks_of_other_kinds(
    dkm: Dkm, tmp_path: Path, factory: str, inputs: tuple[InputSpec, ...], batch_norm: BatchNorm
) -> None:
    rule = LayerRule(bits=3, dim=2)
    model = palettize(f"tests.zoo:{factory}", inputs, rule, batch_norm=batch_norm)
    save_checkpoint(model, tmp_path / "model.dkm.safetensors")
    code, found = dkm("export", "--target", "all", tmp_path, "-o", tmp_path / "out")
    assert code == 0, found
    code, report = dkm("check", tmp_path / "out", "--require", ",".join(RUNTIMES))
    assert code == 0, report


@pytest.mark.slow
def test_mobilenet_at_full_size(dkm: Dkm, tmp_path: Path) -> None:
    recipe = RECIPES / "mobilenet_v1_random.toml"
    assert dkm("compress", recipe, "-o", tmp_path / "run")[0] == 0
    assert dkm("export", "--target", "all", tmp_path / "run", "-o", tmp_path / "out")[0] == 0
    code, report = dkm("check", tmp_path / "out", "--require", ",".join(RUNTIMES))
    assert code == 0
    assert report["fp32_bytes"] > 16.9e6
    for artifact in report["artifacts"]:
        assert artifact["bytes"] <= 1.15e6


class Hurried(OnnxRuntime):
    """Has time for one batch of the test split."""

    test_seconds = 0


def test_a_test_split_that_takes_too_long_is_said_to_be_cut_short(export: Path) -> None:
    model = load_checkpoint(export / "model.dkm.safetensors")
    samples = load_samples(export / "samples.safetensors", model.source)
    reference = make_reference(model, samples, {})
    assert reference.test_outputs is not None
    shifted = replace(reference, test_outputs=reference.test_outputs + 1)
    artifact = export / "onnx" / "digits_cnn.onnx"
    found = {}
    for name, expected in (("right", reference), ("wrong", shifted)):
        report = check_runtime(artifact, Hurried(), expected, Gates())
        assert report.metric is None
        assert report.version == f"onnxruntime {metadata.version('onnxruntime')}"
        found[name] = next(entry for entry in report.findings if entry.check == "predictions")
    part = "the first 1 of 360 test inputs"
    assert found["right"].message == f"0 of {part} differ, 0 more within a tie"
    assert found["right"].status == "pass"
    assert found["wrong"].message.startswith(f"over {part}: relative L2 ")
    assert found["wrong"].status == "fail"


class Elsewhere(Digits):
    """Digits whose data are in a folder, as far as it knows."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self._root = Path(root)

    def size(self, split: Split) -> int:
        if not self._root.is_dir():
            raise InvalidInput(f"{self._root}: no such folder")
        return super().size(split)


def test_the_data_may_be_somewhere_else_or_nowhere(dkm: Dkm, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    task = f"task={{factory='{__name__}:Elsewhere',arguments={{root='{data}'}}}}"
    short = ("train.epochs=0", "dkm.epochs=0", task)
    settings = [part for setting in short for part in ("--set", setting)]
    assert dkm("compress", RECIPES / "digits.toml", "-o", tmp_path / "run", *settings)[0] == 0
    moved = data.rename(tmp_path / "moved")
    export = ("export", "--target", "onnx", tmp_path / "run", "-o", out, "--force")
    code, found = dkm(*export)
    assert code == 2
    assert found["error"]["message"] == (
        f"{data}: no such folder: say where the task's data are with --data KEY=VALUE, or do "
        "without them with --no-data"
    )
    code, found = dkm(*export, "--data", "root.x=1")
    assert (code, found["error"]["message"]) == (
        2,
        "'root.x=1' is no argument of a task: write key=value",
    )
    for there, metric in ((("--data", f"root={moved}"), True), (("--no-data",), False)):
        assert dkm(*export, *there)[0] == 0
        assert dkm("check", out)[0] == 2
        code, report = dkm("check", out, "--require", "onnxruntime", *there)
        (run,) = (entry for entry in report["runtimes"] if entry["runtime"] == "onnxruntime")
        assert (code, run["status"]) == (0, "pass")
        assert (run["metric"] is not None, report["metric_name"] is not None) == (metric, metric)
    code, report = dkm("check", out, "--no-data", "--max-drop", "1")
    assert code == 2
