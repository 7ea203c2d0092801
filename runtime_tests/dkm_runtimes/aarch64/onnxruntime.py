"""ONNX Runtime for aarch64 Linux: its wheel, in a Python for aarch64."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from dkm_export.errors import Unsupported
from dkm_runtimes.aarch64 import debian, emulator, wheels
from dkm_runtimes.onnx_process import OnnxProcess, OnnxProcessRuntime

_HERE = Path(__file__).parent
_PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6")


class OnnxRuntimeAarch64(emulator.EmulatedRuntime, OnnxProcessRuntime):
    """Runs ``.onnx`` files with ONNX Runtime's default settings, as an app would."""

    name = "onnxruntime-aarch64"
    version = "1.32.0"
    title = "ONNX Runtime for aarch64"
    program = "qemu"

    def download(self, folder: Path, progress: Callable[[str], None]) -> None:
        """Let apt get qemu and Python, and pip the wheels; then start them once.

        Raises:
            Unsupported: when they cannot be had, or do not run.
        """
        progress(f"{self.name} {self.version}: emulator and Python, from apt")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            here, there = Path(work, "here"), Path(work, "there")
            debian.unpack(self.name, [emulator.QEMU], here)
            debian.unpack(self.name, _PACKAGES, there, architecture="arm64")
            _keep_python(there, emulator.install(here, folder))
        progress(f"{self.name} {self.version}: wheels, from pip")
        version = _python(folder).name.removeprefix("python")
        wheels.unpack(self.name, _HERE / "onnxruntime.txt", version, folder / "site")
        # Without -B: what Python compiles is installed too.
        OnnxProcess(self.name, self.program, _server(folder))

    def command(self) -> list[str]:
        """The emulated Python with our program, which takes the folder of the packages."""
        return _server(self.installation.folder, "-B")


def _server(folder: Path, *options: str) -> list[str]:
    program = (str(_HERE / "server.py"), str(folder / "site"))
    return emulator.command(folder, _python(folder), "-I", "-S", *options, *program)


def _python(folder: Path) -> Path:
    """The program ``python3.11``, or of another version.

    Raises:
        Unsupported: when there is none.
    """
    programs = (emulator.system(folder) / "usr" / "bin").glob("python3.*")
    found = [program for program in programs if re.fullmatch(r"python3\.\d+", program.name)]
    if not found:
        raise Unsupported(f"{folder}: apt's packages for arm64 have no Python 3")
    return found[0]


def _keep_python(unpacked: Path, system: Path) -> None:
    """Move Python and all libraries to where they are found when they run."""
    for name in ("lib", "usr/lib", "usr/bin"):
        if (unpacked / name).exists():
            (system / name).parent.mkdir(exist_ok=True)
            (unpacked / name).rename(system / name)
    if not (system / "lib").exists():  # where all is below /usr, a link that no package has
        (system / "lib").symlink_to("usr/lib")
    for path in system.rglob("*"):
        if path.is_symlink() and path.readlink().is_absolute():  # leads to files of this machine
            path.unlink()
