"""The examples in docs/pipelines: their linters are content, and dkm knows their options."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dkm_export.checking.gates import ALL, load_gates
from dkm_export.cli.main import main

PIPELINES = Path(__file__).parents[1] / "docs" / "pipelines"
FILES = ("Fastfile", "dkm.gradle.kts", "github.yml", "xcode.sh")


def _run(*command: object, **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    arguments = list(map(str, command))
    return subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    "command",
    [
        ("shellcheck", "xcode.sh"),
        ("check-jsonschema", "--builtin-schema", "vendor.github-workflows", "github.yml"),
        ("actionlint", "github.yml"),
        ("ruby", "-wc", "Fastfile"),
    ],
    ids=lambda command: command[0],
)
def test_linters_have_nothing_to_say(command: tuple[str, ...]) -> None:
    name, *arguments, file = command
    places = (str(Path(sys.executable).parent), os.environ["PATH"])
    program = shutil.which(name, path=os.pathsep.join(places))
    if program is None:
        pytest.skip(f"{name} is not installed")
    done = _run(program, *arguments, PIPELINES / file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_gates_are_such_a_file() -> None:
    gates = load_gates(PIPELINES / "gates.toml")
    assert gates.require == ("onnxruntime", "coreml-reference")
    assert gates.max_bytes == {ALL: 3_300_000, "onnx": 800_000}


@pytest.mark.parametrize("file", FILES)
def test_dkm_knows_the_options(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    code = re.sub(r"(^|\s)(#|//).*", "", (PIPELINES / file).read_text(), flags=re.MULTILINE)
    used = set(re.findall(r"--[a-z-]+", code))
    assert {"--gates", "--junit"} <= used <= known


@pytest.mark.parametrize("code", [0, 3, 4])
def test_the_xcode_phase_ends_as_dkm_does(code: int, tmp_path: Path) -> None:
    program = tmp_path / "dkm"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@"\nexit {code}\n')
    program.chmod(0o755)
    root = tmp_path / "an app"
    place = {"SRCROOT": root, "DERIVED_FILE_DIR": tmp_path / "derived files"}
    done = _run(PIPELINES / "xcode.sh", DKM=program, **place)
    assert done.returncode == code
    assert done.stdout.splitlines() == [
        "check",
        f"{root}/model",
        "--gates",
        f"{root}/gates.toml",
        "--junit",
        f"{tmp_path}/derived files/dkm.xml",
        "--force",
        "--format",
        "xcode",
        "--quiet",
    ]
    done = _run(PIPELINES / "xcode.sh", **place)
    assert (done.returncode, done.stdout) == (
        4,
        f"error: {root}/.venv/bin/dkm is not there: install dkm-export, or set DKM in the build "
        "settings\n",
    )
