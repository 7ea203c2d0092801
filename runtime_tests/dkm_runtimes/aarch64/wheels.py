"""Wheels for aarch64 Linux into a folder: those of a requirements file, by their hashes."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

from dkm_export.errors import Unsupported
from dkm_runtimes import installer

_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64")
_ERROR = re.compile(r"^ERROR: (.+)", re.MULTILINE)


def unpack(name: str, requirements: Path, python: str, folder: Path) -> None:
    """Let pip download and unpack wheels, from the index that the user set.

    Args:
        name: what they are for, for messages.
        requirements: a file that pins versions and hashes.
        python: the version of Python that they are for: ``3.11``.
        folder: where the packages go.

    Raises:
        Unsupported: when pip is missing or cannot get them, with its reason.
    """
    if find_spec("pip") is None:
        raise Unsupported(f"{name}: pip is not installed: python -m ensurepip")
    options = ("--require-hashes", "--no-deps", "--only-binary=:all:", "--no-compile")
    quiet = ("--quiet", "--no-input", "--no-cache-dir", "--disable-pip-version-check")
    command = [
        *(sys.executable, "-m", "pip", "install", *options, *quiet, "--retries=1"),
        *(f"--platform={platform}" for platform in _PLATFORMS),
        *(f"--python-version={python}", f"--target={folder}", f"--requirement={requirements}"),
    ]
    done = installer.run(name, command)
    if done.returncode:
        match = _ERROR.search(done.stderr)
        reason = match[1] if match else f"exit code {done.returncode}"
        raise Unsupported(
            f"{name}: pip cannot get wheels for Python {python} on aarch64: {reason}: see with "
            f"`pip download {requirements.stem}` whether pip reaches its index"
        )
