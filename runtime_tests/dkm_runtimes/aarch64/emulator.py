"""qemu's user mode: programs for aarch64 Linux, with a folder in the place of their system."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dkm_export.checking.runtime import InstallableRuntime
from dkm_export.errors import Unsupported
from dkm_runtimes.aarch64.debian import missing_program

QEMU: Final = "qemu-user-static"
"""The package."""

_CPU: Final = "cortex-a76"
"""That of phones since 2018. qemu's default has SVE, which they lack, and with that ONNX Runtime
takes 30 times as long."""

_FEATURES: Final = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop "
    "asimddp ssbs"
)

_SYSTEM: Final = {
    # as Linux has it on that CPU; on the one of this machine, ONNX Runtime 1.32 crashes
    "proc/cpuinfo": (
        f"processor\t: 0\nBogoMIPS\t: 48.00\nFeatures\t: {_FEATURES}\nCPU implementer\t: 0x41\n"
        "CPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n"
    ),
    # the machine's own names libraries that are not for these programs
    "etc/ld.so.cache": "",
}
"""Files that would otherwise be those of this machine."""


class EmulatedRuntime(InstallableRuntime):
    """Runs on the CPU that qemu emulates, from an installation with a qemu of its own."""

    where = "aarch64 Linux, emulated"
    only_named = "emulated and slow"
    test_seconds = 180

    def unavailable(self) -> str | None:
        """Why this runtime cannot run here, or None."""
        reason = super().unavailable()
        return _impossible() or reason if reason else None

    def install(self, progress: Callable[[str], None]) -> None:
        """Download and build the files, unless they are there and whole.

        Raises:
            Unsupported: when they cannot be had, with the reason; then nothing has changed.
        """
        if reason := _impossible():
            raise Unsupported(f"{self.name}: {reason}")
        super().install(progress)

    def reported_version(self) -> str:
        """Of the runtime and of qemu."""
        return f"{self.name} {self.version}, {_version(self.installation.folder)}"


def install(unpacked: Path, folder: Path) -> Path:
    """Put qemu into an installation.

    Args:
        unpacked: the files of the package `QEMU`.
        folder: of the installation.

    Returns:
        The folder in it that is ``/`` for the emulated programs.

    Raises:
        Unsupported: when the package has no emulator for aarch64.
    """
    program = unpacked / "usr" / "bin" / "qemu-aarch64-static"
    if not program.is_file():
        raise Unsupported(f"{folder}: the package {QEMU} of this system has no {program.name}")
    shutil.copy(program, _qemu(folder))
    root = system(folder)
    for name, content in _SYSTEM.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return root


def command(folder: Path, program: Path, *arguments: str) -> list[str]:
    """What starts a program of an installation."""
    options = ("-cpu", _CPU, "-L", str(system(folder)), "-U", "LD_LIBRARY_PATH", "-U", "LD_PRELOAD")
    return [str(_qemu(folder)), *options, str(program), *arguments]


def system(folder: Path) -> Path:
    """The folder in an installation that is ``/`` for the emulated programs."""
    return folder / "root"


def _qemu(folder: Path) -> Path:
    return folder / "qemu-aarch64"


def _version(folder: Path) -> str:
    shown = subprocess.run([_qemu(folder), "--version"], capture_output=True, text=True)
    match = re.search(r"version (\S+)", shown.stdout)
    return f"qemu {match[1] if match else 'of unknown version'}"


def _impossible() -> str | None:
    """Why the files cannot be had here, or None."""
    if platform.machine() in ("aarch64", "arm64"):
        return "this machine is aarch64 itself: use the runtimes that run natively"
    return missing_program()
