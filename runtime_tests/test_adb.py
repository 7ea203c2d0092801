"""Checks on Android devices: the real adb, and devices on loopback that are none."""

from __future__ import annotations

import gc
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dkm_models
from dkm_export.checkpoint import save_checkpoint
from dkm_export.cli.main import main
from dkm_export.spec import LayerRule
from dkm_exporters.executorch.native import RUNNER, built
from dkm_runtimes import adb, child
from dkm_runtimes.aarch64.emulator import command
from dkm_runtimes.aarch64.executorch import ExecuTorchAarch64
from tests.adb_device import AdbServer, LoopbackDevice, adb_server, needs_adb
from tests.compiler import needs_compiler
from tests.zoo import IMAGE, palettize

pytestmark = [needs_adb, needs_compiler]
RECIPE = Path(dkm_models.__path__[0]) / "recipes" / "digits.toml"

Check = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AdbServer]:
    """A private adb server. At the end, the test has left no process and no file behind it."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    before = children()
    with adb_server(tmp_path, monkeypatch) as server:
        yield server
        eventually(lambda: children() <= before)
        assert [path for path in temporary.iterdir() if not path.name.startswith("adb.")] == []


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an export: a small network as ONNX, and as a program beside its weights."""
    folder = tmp_path_factory.mktemp("export")
    model = palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=3, dim=2))
    save_checkpoint(model, folder / "model.dkm.safetensors")
    setting = ("--set", "executorch.backend=xnnpack-ptd")
    targets = ("--target", "executorch", "--target", "onnx")
    command = ("export", *targets, str(folder), "-o", str(folder / "out"), "-q")
    assert main([*command, *setting]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def runner() -> Path:
    return built() / RUNNER


@pytest.fixture(scope="module")
def aarch64() -> Path:
    """The folder of an installation; asked for before the fixtures that change HOME."""
    runtime = ExecuTorchAarch64()
    if reason := runtime.unavailable():
        pytest.skip(reason)
    return runtime.installation.folder


@pytest.fixture
def check(export: Path, runner: Path, capfd: pytest.CaptureFixture[str]) -> Check:
    """Check an export here and on devices: the exit code, the report and warnings."""

    def run(*devices: str, runner: Path = runner, out: Path = export) -> Any:
        capfd.readouterr()
        arguments = ["check", str(out), "--runtime", "executorch", "--json"]
        arguments += [word for device in devices for word in ("--device", device)]
        code = main([*arguments, "--device-runner", str(runner)])
        captured = capfd.readouterr()
        warned = [line for line in captured.err.splitlines() if "warning" in line]
        return code, json.loads(captured.out) | {"warnings": warned}

    return run


def children() -> set[int]:
    """Processes whose parent is this one."""
    parent, found = os.getpid(), set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == parent:
            found.add(int(file.parent.name))
    return found


def eventually(holds: Callable[[], bool]) -> None:
    """Processes take a moment to end after their connection is closed; on a busy machine, more."""
    for _ in range(600):
        gc.collect()  # a process ends with its session, which an error's traceback may hold
        if holds():
            return
        time.sleep(0.05)
    assert holds()


def left_on(device: LoopbackDevice) -> list[str]:
    return [path.name for path in device.local("/data/local/tmp").glob("*")]


def runs(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["runtime"].partition(":")[2] or "here": entry for entry in report["runtimes"]}


def message(entry: dict[str, Any]) -> str:
    """What the only finding of a runtime says."""
    (finding,) = entry["findings"]
    return str(finding["message"])


def test_a_device(server: AdbServer, check: Check) -> None:
    device = server.add("Loopback 3")
    code, report = check("adb")
    assert code == 0
    found = runs(report)
    assert found.keys() == {"here", device.serial}
    entry = found[device.serial]
    assert entry["status"] == "pass"
    assert entry["runtime"] == f"executorch-adb:{device.serial}"
    assert entry["where"] == f"adb:{device.serial}, Loopback 3, x86_64"
    assert report["required"] == [entry["runtime"]]
    assert {finding["check"] for finding in entry["findings"]} == {"fidelity", "negative control"}
    assert left_on(device) == []


@pytest.mark.slow
def test_a_device_that_runs_programs_for_aarch64(
    aarch64: Path, server: AdbServer, check: Check
) -> None:
    runner = aarch64 / "runner" / RUNNER
    *emulator, _ = command(aarch64, runner)
    device = server.add("Emulated", abi="arm64-v8a", run_with=shlex.join(emulator))
    code, report = check("adb", runner=runner)
    entry = runs(report)[device.serial]
    assert (code, entry["status"]) == (0, "pass")
    assert entry["where"] == f"adb:{device.serial}, Emulated, arm64-v8a"
    assert left_on(device) == []


@pytest.mark.slow
def test_the_test_split_of_a_task(server: AdbServer, check: Check, tmp_path: Path) -> None:
    short = ("--set", "train.epochs=0", "--set", "dkm.epochs=0")
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["compress", str(RECIPE), "-o", str(run), "-q", *short]) == 0
    assert main(["export", "--target", "executorch", str(run), "-o", str(out), "-q"]) == 0
    device = server.add()
    code, report = check("adb", out=out)
    assert code == 0
    found = runs(report)
    assert found[device.serial]["metric"] == found["here"]["metric"]
    assert found[device.serial]["findings"][-1]["check"] == "predictions"
    assert left_on(device) == []


def test_a_device_that_dies_takes_no_other_with_it(server: AdbServer, check: Check) -> None:
    dying, living = server.add("First"), server.add("Second")
    dying.dies_after = 15  # of 25 commands
    code, report = check(f"adb:{dying.serial}", f"adb:{living.serial}")
    assert code == 3
    found = runs(report)
    assert {name: entry["status"] for name, entry in found.items()} == {
        "here": "pass",
        dying.serial: "error",
        living.serial: "pass",
    }
    assert message(found[dying.serial]) == (
        f"lost the device: adb:{dying.serial} is offline: connect it again"
    )
    assert found[dying.serial]["where"] == f"adb:{dying.serial}, First, x86_64"
    assert report["missing"] == []
    assert dying.commands == 16
    assert left_on(living) == []
    assert len(left_on(dying)) == 1  # nobody can reach it


@pytest.mark.slow
@pytest.mark.parametrize("steps", range(25))
def test_a_device_may_die_at_any_step(server: AdbServer, check: Check, steps: int) -> None:
    device = server.add()
    device.dies_after = steps
    code, report = check(f"adb:{device.serial}")
    entry = runs(report)[device.serial]
    # without its name and ABI, the device was not there at the start; at the end, all has run
    expected = {0: (4, "not_run"), 24: (0, "pass")}.get(steps, (3, "error"))
    assert (code, entry["status"]) == expected
    if entry["status"] != "pass":
        assert message(entry).startswith(f"lost the device: adb:{device.serial} is ")
    assert len(report["warnings"]) == (steps > 0)
    for line in report["warnings"]:
        assert "may be left there: lost the device: " in line


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adb, "_SOON", 2)
    monkeypatch.setattr(adb, "_PATIENCE", 2)
    monkeypatch.setattr(child, "_PATIENCE", 2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("mkdir", "adb:{} hangs: `adb shell` took over 2 seconds"),
        ("sync:", "adb:{} hangs: `adb push` took over 2 seconds"),
        ("model.pte", "executorch: the runner did not answer within 2 seconds"),
    ],
)
def test_a_device_that_hangs(server: AdbServer, check: Check, place: str, said: str) -> None:
    device = server.add()
    device.hangs_at = place
    code, report = check(f"adb:{device.serial}")
    entry = runs(report)[device.serial]
    assert (code, entry["status"]) == (3, "error")
    assert message(entry) == said.format(device.serial)
    assert left_on(device) == []


def script(file: Path, lines: str) -> Path:
    """A runner that is a script; it exits like ours when it is asked for its usage."""
    file.write_text(f"#!/bin/sh\n[ $# = 0 ] && exit 2\n{lines}\n")
    return file


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("lines", "status", "said"),
    [
        ("echo '{}'; read line; exec sleep 100", "error", "did not answer within 2 seconds"),
        ("echo '{}'; read line; echo killed >&2; exit 9", "error", "ended with code 9: killed"),
        ("echo '{}'; read line; echo '{\"error\": \"no\"}'", "error", "the runner fails: no"),
        ("echo '{}'; read line; echo '{\"outputs\": 1}'", "error", "does not exist"),
        ("echo '{}'; read line; echo '{\"outputs\": 1e9}'", "error", "not our runner, it answers"),
        ("echo hello", "not_run", "not our runner, it answers b'hello"),
        ("echo missing >&2; exit 1", "not_run", "ended with code 1: missing"),
        ('echo \'{"error": "NotFound"}\'; exit 3', "not_run", "rejects the program"),
    ],
)
def test_a_runner_that_misbehaves(
    server: AdbServer, check: Check, tmp_path: Path, lines: str, status: str, said: str
) -> None:
    device = server.add()
    code, report = check(f"adb:{device.serial}", runner=script(tmp_path / "runner", lines))
    entry = runs(report)[device.serial]
    assert (code, entry["status"]) == (3 if status == "error" else 4, status)
    assert said in message(entry)
    assert left_on(device) == []


def test_a_device_that_dies_while_it_computes(
    server: AdbServer, check: Check, tmp_path: Path
) -> None:
    device = server.add()

    def kill() -> None:
        place = device.local("/data/local/tmp")
        eventually(lambda: bool(list(place.glob("*/started"))))
        device.die()

    killer = threading.Thread(target=kill)
    killer.start()
    lines = "echo '{}'; read line; echo > started; exec sleep 100"
    code, report = check(f"adb:{device.serial}", runner=script(tmp_path / "runner", lines))
    killer.join()
    entry = runs(report)[device.serial]
    assert (code, entry["status"]) == (3, "error")
    assert message(entry).startswith(f"lost the device: adb:{device.serial} is ")


def test_runners_for_another_device(server: AdbServer, check: Check, tmp_path: Path) -> None:
    device = server.add()
    (tmp_path / "runner").write_bytes(b"\x7fELF, but of another machine")
    for runner, said in (
        (tmp_path / "runner", "ended with code 126: "),
        (Path("/bin/true"), "ended with code 0: "),
    ):
        code, report = check(f"adb:{device.serial}", runner=runner)
        entry = runs(report)[device.serial]
        assert (code, entry["status"]) == (4, "not_run")
        assert message(entry).startswith(f"{runner} does not run there: adb:{device.serial}: ")
        assert said in message(entry)
        assert report["missing"] == [f"runtime executorch-adb:{device.serial} did not run"]
        assert left_on(device) == []


def test_a_full_device(server: AdbServer, check: Check) -> None:
    device = server.add()
    device.storage = 100_000
    code, report = check(f"adb:{device.serial}")
    entry = runs(report)[device.serial]
    assert (code, entry["status"]) == (3, "error")
    assert message(entry).endswith("No space left on device")
    assert left_on(device) == []


def test_devices_that_cannot_be_used(
    server: AdbServer, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, locked = server.add(emulated=True), server.add(unauthorized=True)
    code, report = check("adb:absent", f"adb:{locked.serial}", f"adb:{device.serial}")
    assert code == 4
    found = runs(report)
    assert {name: entry["status"] for name, entry in found.items()} == {
        "here": "pass",
        "absent": "not_run",
        locked.serial: "not_run",
        device.serial: "pass",
    }
    assert message(found["absent"]).startswith("adb:absent is not connected: `adb devices` lists ")
    assert message(found[locked.serial]) == (
        f"adb:{locked.serial} is unauthorized: allow this computer on its screen"
    )
    assert found[device.serial]["where"].endswith(", Loopback, x86_64, Android's emulator")
    assert report["missing"] == [
        "runtime executorch-adb:absent did not run",
        f"runtime executorch-adb:{locked.serial} did not run",
    ]

    code, report = check("adb")
    assert code == 2
    assert "several Android devices are connected: choose with" in report["error"]["message"]
    assert device.serial in report["error"]["message"]

    monkeypatch.setattr(shutil, "which", lambda program: None)
    code, report = check("adb:absent")
    assert code == 4
    assert message(runs(report)["absent"]) == (
        "adb is not on the PATH: install Android's platform-tools"
    )


def test_no_device_at_all(server: AdbServer, check: Check) -> None:
    code, report = check("adb")
    assert code == 4
    assert "no Android device is connected" in report["error"]["message"]


def test_wrong_arguments(check: Check, tmp_path: Path) -> None:
    code, report = check("usb:1")
    assert (code, report["error"]["message"]) == (2, "no kind of device 'usb': choose from adb")
    code, report = check("adb:absent", runner=tmp_path / "absent")
    assert code == 2
    assert f"{tmp_path / 'absent'}: there is no such file" in report["error"]["message"]
    code, report = check()
    assert (code, "name one with --device" in report["error"]["message"]) == (2, True)


def test_a_device_for_other_artifacts(
    server: AdbServer, export: Path, runner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["check", str(export / "onnx" / "convolutions.onnx"), "--device", "adb:absent"]
    assert main([*command, "--device-runner", str(runner), "-q"]) == 2
    assert capsys.readouterr().err == (
        "dkm: error: runtime 'executorch-adb:absent' runs executorch artifacts, "
        "and here are only: onnx\n"
    )


@pytest.mark.slow
def test_a_check_that_is_given_up_leaves_nothing(
    server: AdbServer, export: Path, runner: Path, tmp_path: Path
) -> None:
    device = server.add()
    place = device.local("/data/local/tmp")
    lines = "echo '{}'; read line; echo > started; exec sleep 100"
    command = [sys.executable, "-m", "dkm_export", "check", str(export), "--device", "adb"]
    command += ["--runtime", "executorch"]
    command += ["--device-runner", str(script(tmp_path / "runner", lines))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not list(place.glob("*/started")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.decode().splitlines()[-1] == "dkm: error: interrupted"
    assert left_on(device) == []
