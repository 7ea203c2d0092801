"""`dkm runtimes`, and installations, with an npm that downloads nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dkm_export.checking.installation import Installation
from dkm_export.cli.main import main
from dkm_runtimes.node import OnnxRuntimeNode, OnnxRuntimeWeb

NAME = OnnxRuntimeWeb.name
HERE = f"dkm runtimes install {NAME}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dkm-export"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the PATH: a node that does nothing, and an npm that counts its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    program(folder / "node", "exit 0")
    program(
        folder / "npm",
        f'echo "$@" >> {tmp_path}/calls; /bin/mkdir node_modules; echo x > node_modules/a',
    )
    return folder


def program(file: Path, script: str) -> None:
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def calls(tmp_path: Path) -> list[str]:
    file = tmp_path / "calls"
    return file.read_text().splitlines() if file.exists() else []


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code and the one line on stderr."""
    code = main(["runtimes", *arguments, "-q"])
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


def test_installs_once_and_removes(
    programs: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cache / NAME / OnnxRuntimeWeb.version
    assert OnnxRuntimeWeb().unavailable() == f"not installed: {HERE}"
    for _ in range(2):
        assert main(["runtimes", "install", NAME, "--json"]) == 0
        (entry,) = json.loads(capsys.readouterr().out)["runtimes"]
        assert entry["runtime"] == NAME
        assert entry["folder"] == str(folder)
        assert OnnxRuntimeWeb().unavailable() is None
    assert calls(tmp_path) == ["ci --ignore-scripts --no-audit --no-fund --fetch-retries=1"]
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]

    for line in (f"{NAME} is removed", f"{NAME} was not installed"):
        assert main(["runtimes", "remove", NAME]) == 0
        assert capsys.readouterr().out == f"{line}\n"
        assert list(cache.iterdir()) == []


def test_what_is_damaged_is_found_and_installed_again(
    programs: Path, cache: Path, tmp_path: Path
) -> None:
    runtime = OnnxRuntimeWeb()
    runtime.install(print)
    folder = runtime.installation.folder
    file = folder / "node_modules" / "a"
    receipt = folder / "dkm-export.json"
    for damaged, reason in ((file, f"damaged at {file}"), (receipt, "damaged")):
        damaged.write_text("")
        assert runtime.unavailable() == f"{reason}: {HERE}"
        runtime.install(print)
        damaged.unlink()
        assert runtime.unavailable() == f"{reason}: {HERE}"
        runtime.install(print)
        assert runtime.unavailable() is None
    assert len(calls(tmp_path)) == 5


def test_a_failed_install_says_why_and_leaves_nothing(
    programs: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(
        programs / "npm",
        "echo 'npm error code ECONNREFUSED\nnpm error errno X\nnpm error it is down' >&2; "
        "echo x > half; exit 1",
    )
    code, line = error(capsys, "install", NAME)
    assert code == 4
    assert f"{NAME}: npm cannot install it: it is down: see with `npm ping`" in line
    assert list((cache / NAME).iterdir()) == []
    program(programs / "npm", "exit 7")
    assert "exit code 7" in error(capsys, "install", NAME)[1]


@pytest.mark.parametrize("missing", ["node", "npm"])
def test_missing_programs_are_named(
    missing: str, programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (programs / missing).unlink()
    code, line = error(capsys, "install", NAME)
    assert code == 4
    assert f"{NAME}: {missing} is not on the PATH: install Node.js" in line


def test_an_installed_runtime_without_node(programs: Path) -> None:
    OnnxRuntimeWeb().install(print)
    (programs / "node").unlink()
    reason = OnnxRuntimeWeb().unavailable()
    assert reason is not None
    assert reason.startswith("node is not on the PATH")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["install", "onnxruntime"], "'onnxruntime' is not one that dkm downloads: choose from "),
        (["remove", "onnxrutime"], "no runtime 'onnxrutime': choose from "),
        (["install", NAME, "coreml"], "'coreml' is not one that dkm downloads: choose from "),
        (["destroy", NAME], "invalid choice: 'destroy'"),
        (["install"], "required: R: see `dkm runtimes --help`"),
    ],
)
def test_wrong_names(
    arguments: list[str],
    message: str,
    programs: Path,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, line = error(capsys, *arguments)
    assert code == 2
    assert message in line
    if "choose from" in message:
        assert "onnxruntime-node" in line
        assert NAME in line
    assert not cache.exists()


def test_the_cache_folder(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installation = Installation("name", "1.0")
    assert installation.folder == cache / "name" / "1.0"
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert installation.folder == tmp_path / ".cache" / "dkm-export" / "name" / "1.0"


@pytest.mark.parametrize("runtime", [OnnxRuntimeNode, OnnxRuntimeWeb])
def test_the_lock_pins_versions_and_hashes_but_no_host(runtime: type[OnnxRuntimeNode]) -> None:
    import dkm_runtimes.node

    folder = Path(dkm_runtimes.node.__path__[0]) / runtime.name
    assert json.loads((folder / "package.json").read_text())["dependencies"] == {
        runtime.name: runtime.version
    }
    packages = json.loads((folder / "package-lock.json").read_text())["packages"]
    assert packages.pop("")["dependencies"] == {runtime.name: runtime.version}
    assert packages[f"node_modules/{runtime.name}"]["version"] == runtime.version
    for name, package in packages.items():
        assert package["integrity"].startswith("sha512-"), name
        assert "resolved" not in package, name
