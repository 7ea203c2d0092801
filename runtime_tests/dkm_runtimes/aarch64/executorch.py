"""ExecuTorch for aarch64 Linux in C++: our runner, cross-compiled against its wheel."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from dkm_export.checking.installation import Installation
from dkm_export.checking.runtime import Session
from dkm_export.errors import Unsupported
from dkm_export.plugins import missing_packages
from dkm_exporters.executorch import native
from dkm_runtimes.aarch64 import debian, emulator, wheels
from dkm_runtimes.executorch_runner import local_session

_REQUIREMENTS = Path(__file__).with_name("executorch.txt")
_COMPILER = "g++-aarch64-linux-gnu"
_LIBRARIES = (
    "ld-linux-aarch64.so.1",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
)
"""What programs in C++ need, out of the compiler's packages; some are empty nowadays."""


class ExecuTorchAarch64(emulator.EmulatedRuntime):
    """The runner and our delegate with the wheel's kernels and XNNPACK."""

    name = "executorch-aarch64"
    target = "executorch"
    version = "1.5.1"
    packages = ("executorch", "cmake", "ninja")

    @property
    def installation(self) -> Installation:
        """Where the files are, or would be: those of our sources as they are now."""
        return Installation(self.name, f"{self.version}-{native.sources_hash()[:16]}")

    def download(self, folder: Path, progress: Callable[[str], None]) -> None:
        """Let apt get qemu and a cross compiler, and pip the wheel; build, and start it once.

        Raises:
            Unsupported: when they cannot be had, or what is built does not run.
        """
        if missing := missing_packages(self.packages, self.target):
            raise Unsupported(f"{self.name}: {missing}")
        runner = folder / "runner"
        with tempfile.TemporaryDirectory(dir=folder) as work:
            here, site = Path(work, "here"), Path(work, "site")
            progress(f"{self.name} {self.version}: emulator and cross compiler, from apt")
            # without libc6: the programs run with the one of this machine, and so does its loader
            debian.unpack(self.name, [emulator.QEMU, _COMPILER], here, without=["libc6"])
            progress(f"{self.name} {self.version}: wheel, from pip")
            wheels.unpack(self.name, _REQUIREMENTS, "3.11", site)
            progress(f"{self.name} {self.version}: compiling")
            _build(here, site / "executorch", runner)
            libraries = emulator.install(here, folder) / "lib"
            libraries.mkdir()
            for name in _LIBRARIES:
                library = here / "usr" / "aarch64-linux-gnu" / "lib" / name
                if library.is_file():
                    shutil.copy(library, libraries)
        tried = subprocess.run(_runner(folder), capture_output=True, text=True, errors="replace")
        if not tried.stderr.startswith("usage: "):
            reason = tried.stderr.strip().rpartition("\n")[2]
            raise Unsupported(f"{self.name}: the runner does not start: {reason}")

    def load(self, artifact: Path) -> Session:
        """Load a program in an emulated process of its own.

        Raises:
            Unsupported: when the runner rejects the program.
            InvalidInput: when the file is missing, malformed or not written by this project.
        """
        return local_session(artifact, _runner(self.installation.folder))


def _runner(folder: Path) -> list[str]:
    return emulator.command(folder, folder / "runner" / native.RUNNER)


def _build(compiler: Path, package: Path, folder: Path) -> None:
    """Build the runner with an unpacked compiler, and put the package's libraries beside it."""
    settings = (
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler / 'usr' / 'bin' / 'aarch64-linux-gnu-g++'}",
        f"-DCMAKE_SYSROOT={compiler}",
        f"-Dexecutorch_DIR={package / 'share' / 'cmake'}",
    )
    libraries = {str(library.parent) for library in compiler.glob("**/lib/*-linux-gnu/*.so.*")}
    native.build(folder, settings, {"LD_LIBRARY_PATH": ":".join(sorted(libraries))})
    for library in (package / "lib").glob("libexecutorch*.so"):
        shutil.copy(library, folder)
