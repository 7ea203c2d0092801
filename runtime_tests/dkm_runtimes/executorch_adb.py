"""ExecuTorch on Android devices: our runner, built for them by the user, through adb."""

from __future__ import annotations

import secrets
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Final

from dkm_export.checking.bridge import Bridge
from dkm_export.checking.runtime import Runtime, Session
from dkm_export.errors import DkmError, DkmWarning, InvalidInput, Unsupported
from dkm_runtimes.adb import AdbDevice, DeviceLost, connected
from dkm_runtimes.executorch import expand_weights
from dkm_runtimes.executorch_runner import RunnerSession

_WRITABLE: Final = "/data/local/tmp"
"""The place where adb's user may write and run programs."""

_RUN: Final = "LD_LIBRARY_PATH=. exec ./dkm_runner"

_USAGE: Final = 2
"""The exit code of the runner without arguments, which no other cause gives."""

_HELP: Final = "'Android devices' in docs/checks.md says how to build it"


class AdbBridge(Bridge):
    """Android devices, by the serials that `adb devices` lists."""

    def connect(self, address: str, runner: Path | None) -> Runtime:
        """The runtime of a device.

        Raises:
            InvalidInput: when there are several devices and ``address`` names none of them, or
                the runner is not there.
            Unsupported: when there is no device and ``address`` names none, or no adb.
        """
        if runner is None:
            raise InvalidInput(f"--device adb needs --device-runner dkm_runner: {_HELP}")
        if not runner.is_file():
            raise InvalidInput(f"{runner}: there is no such file: {_HELP}")
        return ExecuTorchAdbRuntime(AdbDevice(address or _only_device()), runner)


class ExecuTorchAdbRuntime(Runtime):
    """Copies the runner, a program and inputs into a private folder on the device, and runs there.

    Args:
        device: where to run.
        runner: a ``dkm_runner`` for it; the libraries ``*.so`` beside it are copied too.
    """

    target = "executorch"
    packages: ClassVar[tuple[str, ...]] = ("executorch",)

    def __init__(self, device: AdbDevice, runner: Path) -> None:
        self.name = f"executorch-adb:{device.serial}"
        self.where = f"adb:{device.serial}"
        self._device = device
        self._runner = runner
        self._problem = device.problem()
        if self._problem is None:
            try:
                self.where += f", {device.describe()}"
            except DkmError as error:
                self._problem = str(error)

    def unavailable(self) -> str | None:
        """What is not installed here, or why the device could not be used at the start."""
        return super().unavailable() or self._problem

    def load(self, artifact: Path) -> Session:
        """Start the runner with a program.

        Raises:
            Unsupported: when the runner does not run on this device, or rejects the program.
            InvalidInput: when the file is malformed, or the device fails: it is lost or full.
        """
        return _DeviceSession(artifact, self._device, self._runner)


class _DeviceSession(RunnerSession):
    """The folder on the device is removed with this object, or when Python ends."""

    def __init__(self, artifact: Path, device: AdbDevice, runner: Path) -> None:
        self._device = device
        self._place = f"{_WRITABLE}/dkm-export-{secrets.token_hex(8)}"
        weakref.finalize(self, _remove, device, self._place)
        device.shell(f"mkdir -p {self._place}/in {self._place}/out")
        device.push([runner.resolve()], f"{self._place}/dkm_runner")
        libraries = sorted(runner.resolve().parent.glob("*.so"))
        if libraries:
            device.push(libraries, f"{self._place}/")
        self._require_running(runner)
        folder = TemporaryDirectory()
        weights = expand_weights(artifact, Path(folder.name))
        data = ""
        if weights is not None:
            device.push([weights], f"{self._place}/weights.ptd")
            data = " --data weights.ptd"
        device.push([artifact.resolve()], f"{self._place}/model.pte")
        script = f"cd {self._place} && {_RUN} model.pte{data}"
        try:
            super().__init__(artifact, device.command(device.shell_arguments(script)), folder)
        except Unsupported:
            device.require()
            raise

    def _require_running(self, runner: Path) -> None:
        """Ask the runner for its usage, so that a build for another device is not taken for more.

        Raises:
            Unsupported: when it does not run, with what the device says.
        """
        script = f"cd {self._place} && chmod 755 dkm_runner && {_RUN}"
        try:
            self._device.shell(script, code=_USAGE)
        except DeviceLost:
            raise
        except InvalidInput as error:
            raise Unsupported(f"{runner} does not run there: {error}: {_HELP}") from error

    def _execute(self, files: Sequence[Path]) -> list[Path]:
        self._device.push(files, f"{self._place}/in/")
        try:
            names = self._exchange("in", "out")
        except InvalidInput:
            self._device.require()
            raise
        self._device.pull([f"{self._place}/out/{name}" for name in names], self._made)
        return [self._made / name for name in names]


def _remove(device: AdbDevice, folder: str) -> None:
    try:
        device.shell(f"rm -rf {folder}")
    except DkmError as error:
        warnings.warn(DkmWarning(f"{folder} may be left there: {error}"), stacklevel=1)


def _only_device() -> str:
    serials = list(connected())
    if not serials:
        raise Unsupported(
            "no Android device is connected: `adb devices` has to list it, which takes USB "
            "debugging on the device, or `adb connect`"
        )
    if len(serials) > 1:
        raise InvalidInput(
            f"several Android devices are connected: choose with --device adb:SERIAL from "
            f"{', '.join(serials)}"
        )
    return serials[0]
