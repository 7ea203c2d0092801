from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dkm_export
import dkm_models
from dkm_export.checkpoint import save_checkpoint
from dkm_export.cli.main import main
from dkm_export.cli.terminal import Terminal
from dkm_export.spec import LayerRule
from tests.zoo import IMAGE, palettize

RECIPES = Path(dkm_models.__path__[0]) / "recipes"


def _error(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit code and the one line on stderr."""
    code = main([*map(str, arguments), "-q"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


@pytest.fixture
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A checkpoint of one rule, 4 bits unless the test says otherwise."""
    rule = getattr(request, "param", {"bits": 4})
    path = tmp_path / "model.dkm.safetensors"
    save_checkpoint(palettize("tests.zoo:convolutions", IMAGE, LayerRule(**rule)), path)
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["export", "--help"], ["targets"]])
def test_starts_without_torch(arguments: list[str]) -> None:
    script = (
        "import sys; from dkm_export.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'coremltools', 'onnx', 'executorch', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_targets_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema_version"] == 1
    bits = {entry["target"]: entry["bits"] for entry in data["targets"]}
    assert bits["coreml"] == [1, 2, 3, 4, 6, 8]
    assert bits["onnx"] == list(range(1, 9))
    assert {entry["runtime"] for entry in data["runtimes"]} >= {"onnxruntime", "coreml"}


@pytest.mark.parametrize("checkpoint", [{"bits": 5}], indirect=True)
def test_bits_that_core_ml_cannot_hold(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, line = _error(capsys, "export", "--target", "coreml", checkpoint, "-o", out)
    assert code == 4
    assert "coreml: stem.0.weight: bits 5 cannot be held, allowed: 1, 2, 3, 4, 6, 8" in line
    assert not out.exists()


@pytest.mark.parametrize("checkpoint", [{"bits": 4, "dim": 5}], indirect=True)
def test_a_dim_that_does_not_divide_the_axis(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, line = _error(capsys, "export", "--target", "coreml", checkpoint, "-o", out)
    assert code == 4
    assert "stem.0.weight: dim 5 does not divide axis 0 of size 48, allowed: 1, 2, 3, 4, 6" in line
    assert not out.exists()


def test_an_unknown_recipe_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text((RECIPES / "digits.toml").read_text().replace("tau_end", "tau_last"))
    code, line = _error(capsys, "compress", recipe, "-o", tmp_path / "run")
    assert code == 2
    assert "mine.toml: 'dkm.tau_last': unknown key, allowed: " in line


@pytest.mark.parametrize("verb", ["compress", "export"])
def test_an_existing_output_is_left_alone(
    verb: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    source = RECIPES / "digits.toml" if verb == "compress" else checkpoint
    target = [] if verb == "compress" else ["--target", "onnx"]
    code, line = _error(capsys, verb, source, "-o", out, *target)
    assert code == 2
    assert f"{out} exists: name another output or pass --force" in line
    assert [file.name for file in out.iterdir()] == ["precious"]


def test_a_cut_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-10])
    code, line = _error(capsys, "export", "--target", "onnx", checkpoint, "-o", tmp_path / "out")
    assert code == 2
    assert "cut short" in line
    assert "model.dkm.safetensors" in line


def test_a_missing_extra(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    code, line = _error(capsys, "export", "--target", "coreml", checkpoint, "-o", tmp_path / "out")
    assert code == 4
    assert "pip install 'dkm-export[coreml]'" in line


def test_a_factory_that_does_not_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    override = "model.factory='no_such_package:net'"
    recipe = RECIPES / "digits.toml"
    code, line = _error(capsys, "compress", recipe, "-o", tmp_path / "run", "--set", override)
    assert code == 2
    assert "'no_such_package:net' does not import" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "coremll"], "no target 'coremll': choose from coreml, executorch, onnx, ort"),
        (["--target", "onnx", "--set", "coreml.precision=fp32"], "no chosen target: onnx"),
        (["--target", "coreml", "--set", "coreml.precise=1"], "unknown key, allowed: precision"),
        (["--target", "coreml", "--set", "precision=fp32"], "write target.key=value"),
    ],
)
def test_wrong_targets_and_options(
    arguments: list[str],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, line = _error(capsys, "export", checkpoint, "-o", tmp_path / "out", *arguments)
    assert code == 2
    assert message in line


def test_the_public_names_are_there() -> None:
    assert sorted(dkm_export.__all__) == sorted(dkm_export._MODULE_OF)
    for name in dkm_export.__all__:
        assert getattr(dkm_export, name).__name__ == name


@pytest.mark.parametrize("shell", ["dkm inspect {0} | true", "dkm inspect {0} >&-"])
def test_the_exit_code_survives_a_closed_pipe(checkpoint: Path, shell: str) -> None:
    dkm = f"'{sys.executable}' -m dkm_export"
    command = f"set -o pipefail; {shell.format(checkpoint).replace('dkm', dkm, 1)}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (["explode"], "invalid choice: 'explode'"),
        (["inspect", "x", "--jsn"], "unrecognized arguments: --jsn"),
        (["inspect", "x" * 300], "File name too long"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_errors_are_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path), "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["exit_code"] == 2
    assert "no manifest.json here or above" in error["message"]


def test_inspect_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "image.png").write_bytes(b"png")
    code, line = _error(capsys, "inspect", tmp_path / "image.png")
    assert code == 2
    assert "known: .dkm.safetensors, .mlpackage, .pte, .onnx" in line


def test_dry_runs_write_nothing(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = list(checkpoint.parent.iterdir())
    assert main(["export", "--target", "onnx", str(checkpoint), "--dry-run"]) == 0
    assert "onnx: can hold all 5 palettes" in capsys.readouterr().out
    assert main(["compress", str(RECIPES / "digits.toml"), "--dry-run", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {entry["bits"] for entry in layers} == {4, 8}
    assert list(checkpoint.parent.iterdir()) == before


def test_a_long_cell_does_not_pad_all_others(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().table("", ("name", "size"), [("x" * 10**6, 1), *(("y", 1) for _ in range(9))])
    out = capsys.readouterr().out
    assert len(out) < 12 * 220
    assert f"{'x' * 200}..." in out
