"""The native code, built on this machine: once for each version of it and of ExecuTorch."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Final

from dkm_export.checking.installation import Installation
from dkm_export.errors import Unsupported

SOURCES: Final = Path(__file__).parent
"""A CMake project, for apps too."""

BACKEND: Final = "libdkm_lut_backend.so"
RUNNER: Final = "dkm_runner"
EXPAND: Final = "dkm_expand"

_NO_COMPILER: Final = (
    "our native code is built from source, and here is no C++ compiler: install g++ or clang, or "
    "export with executorch.backend=portable"
)

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})

_TOOLS: Final = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}
"""Packages that carry programs, and where they say that these are."""


def unavailable() -> str | None:
    """Why the native code is not there and cannot be built, or None."""
    if Installation("executorch-native", _version()).problem() is None or _compiler():
        return None
    return _NO_COMPILER


def built() -> Path:
    """The folder with `BACKEND`, `RUNNER` and `EXPAND`; builds them if that was not done before.

    Raises:
        Unsupported: when they cannot be built, with the reason.
    """
    installation = Installation("executorch-native", _version())
    if installation.problem():
        if not _compiler():
            raise Unsupported(_NO_COMPILER)
        with installation.staged() as folder:
            build(folder)
    return installation.folder


@functools.cache
def load_backend() -> None:
    """Register our delegate with the ExecuTorch runtime of this process.

    Raises:
        Unsupported: when it cannot be built or loaded, with the reason.
    """
    import executorch.runtime

    executorch.runtime.Runtime.get()  # what the delegate registers with has to be there first
    library = built() / BACKEND
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        raise Unsupported(f"{library}: cannot be loaded: {error}") from error


def build(
    folder: Path, settings: Sequence[str] = (), environment: Mapping[str, str] = _NOTHING
) -> None:
    """Build the native code and install it into ``folder``.

    Args:
        folder: an empty one.
        settings: of CMake, for another architecture: ``-DCMAKE_TOOLCHAIN_FILE=...``.
        environment: variables that the compiler needs besides those of this process.

    Raises:
        Unsupported: when the code does not compile.
    """
    with tempfile.TemporaryDirectory() as work:
        compile_target("all", Path(work), settings, environment)
        _run(environment, "--install", work, "--prefix", str(folder), "--strip")


def compile_target(
    target: str,
    work: Path,
    settings: Sequence[str] = (),
    environment: Mapping[str, str] = _NOTHING,
) -> None:
    """Compile a target of the CMake project in the folder ``work``.

    Raises:
        Unsupported: when it does not compile.
    """
    _run(
        environment,
        *("-S", str(SOURCES), "-B", str(work), "-G", "Ninja"),
        *(f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", "-DCMAKE_BUILD_TYPE=Release"),
        f"-Dexecutorch_DIR={package() / 'share' / 'cmake'}",
        *settings,
    )
    _run(environment, "--build", str(work), "--target", target)


def _run(environment: Mapping[str, str], *arguments: str) -> None:
    command = [_tool("cmake"), *arguments]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if result.returncode:
        raise Unsupported(_explain(result.stdout + result.stderr))


def package() -> Path:
    """Where the ``executorch`` package is; it is not imported."""
    spec = find_spec("executorch")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _version() -> str:
    """Of ExecuTorch, and a hash of our sources and of the place that the code is linked against."""
    digest = hashlib.sha256(f"{package()}{sources_hash()}".encode()).hexdigest()
    return f"{metadata.version('executorch')}-{digest[:16]}"


def sources_hash() -> str:
    """Hex digest of the names and contents of our sources."""
    digest = hashlib.sha256()
    for file in sorted(SOURCES.iterdir()):
        if file.suffix in (".cpp", ".h", ".txt"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _tool(name: str) -> str:
    module = __import__(name)
    return str(Path(getattr(module, _TOOLS[name]), name))


def _compiler() -> str | None:
    """Where CMake finds one."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def _explain(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if "rror" in line]
    return f"executorch: our delegate does not compile: {lines[0] if lines else log[-200:]}"
