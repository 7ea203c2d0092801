"""Android devices through adb, the client of Android's platform-tools."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dkm_export.errors import InvalidInput, Unsupported

_SOON: Final = 30
"""Seconds for a command that does next to nothing; a device that hangs takes longer."""

_PATIENCE: Final = 600
"""Seconds for files to get to the device or back."""

_DONE: Final = "dkm-export: done"

_HELP: Final = {
    "unauthorized": "allow this computer on its screen",
    "offline": "connect it again",
}
"""What to do about a device in one of adb's states."""


class DeviceLost(InvalidInput):
    """A device that was there does not answer any more."""


def connected() -> dict[str, str]:
    """The state of each device that adb sees, by serial: ``device`` for one that can be used.

    adb starts its server when none runs, and leaves it running.

    Raises:
        Unsupported: when adb is not installed or does not work.
    """
    try:
        done = _run(["devices"], _SOON)
    except subprocess.TimeoutExpired as error:
        raise Unsupported(f"adb does not answer within {_SOON} seconds") from error
    if done.returncode:
        raise Unsupported(f"adb does not work: {_reason(done)}")
    lines = (line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
    return {serial: state.strip() for serial, state in lines}


class AdbDevice:
    """A device, by the serial that adb gives it.

    Its methods raise `DeviceLost` when it is gone or hangs, `InvalidInput` when it refuses, and
    `Unsupported` when adb is not installed.
    """

    def __init__(self, serial: str) -> None:
        self.serial = serial

    def problem(self) -> str | None:
        """Why it cannot be used now, or None."""
        try:
            states = connected()
        except Unsupported as error:
            return str(error)
        state = states.get(self.serial, "not connected")
        if state == "device":
            return None
        others = ", ".join(serial for serial in states if serial != self.serial)
        advice = _HELP.get(state, f"`adb devices` lists {others or 'no other'}")
        return f"adb:{self.serial} is {state}: {advice}"

    def require(self) -> None:
        """Raises `DeviceLost` when it cannot be used any more."""
        problem = self.problem()
        if problem:
            raise DeviceLost(f"lost the device: {problem}")

    def describe(self) -> str:
        """Its model and ABI and whether it is an emulator, as it says itself."""
        names = ("ro.product.model", "ro.product.cpu.abi", "ro.boot.qemu")
        said = self.shell("; ".join(f"getprop {name}" for name in names))
        printable = "".join(c for c in said if c == "\n" or c.isprintable())
        model, abi, emulated = [*printable.split("\n"), "", "", ""][:3]
        kind = ["Android's emulator"] if emulated == "1" else []
        return ", ".join([model or "unknown model", abi or "unknown ABI", *kind])

    def shell(self, script: str, *, code: int = 0) -> str:
        """Run a script that takes next to no time, and has to end with this code.

        Returns:
            What it writes to stdout.
        """
        # adb ends with 0 when it loses the device, so the script has to say that it came to its end
        whole = f"( {script} ); code=$?; echo {_DONE}; exit $code"
        said, done, _ = self._run(self.shell_arguments(whole), _SOON, code).rpartition(_DONE)
        if not done:
            self.require()
            raise DeviceLost(f"lost the device: adb:{self.serial} did not finish `{script}`")
        return said

    def shell_arguments(self, script: str) -> list[str]:
        """Arguments of adb that run a script: without a terminal, which would change bytes."""
        return ["shell", "-T", script]

    def push(self, files: Sequence[Path], target: str) -> None:
        """Copy files to ``target``: a folder's path and ``/``, or of one file its new path."""
        self._run(["push", *map(str, files), target], _PATIENCE)

    def pull(self, files: Sequence[str], folder: Path) -> None:
        """Copy files into a folder here."""
        self._run(["pull", *files, f"{folder}/"], _PATIENCE)

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command for a process of adb that works with this device."""
        return [_adb(), "-s", self.serial, *arguments]

    def _run(self, arguments: Sequence[str], seconds: int, code: int = 0) -> str:
        try:
            done = _run(["-s", self.serial, *arguments], seconds)
        except subprocess.TimeoutExpired as error:
            raise DeviceLost(
                f"adb:{self.serial} hangs: `adb {arguments[0]}` took over {seconds} seconds"
            ) from error
        if done.returncode != code:
            self.require()
            said = _reason(done) or "it says nothing"
            raise InvalidInput(
                f"adb:{self.serial}: `adb {arguments[0]}` ended with code {done.returncode}: {said}"
            )
        return done.stdout


def _run(arguments: Sequence[str], seconds: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [_adb(), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
    )


def _adb() -> str:
    program = shutil.which("adb")
    if program is None:
        raise Unsupported("adb is not on the PATH: install Android's platform-tools")
    return program


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The line with an error, or else the last one."""
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).split("\n")]
    said = [line for line in lines if line and line != _DONE]
    errors = [line for line in said if "error:" in line]
    return (errors or said or [""])[-1]
