"""npm packages into a folder: exactly those of a lock file, verified, no script of theirs run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from dkm_export.errors import Unsupported
from dkm_runtimes import installer

_ERROR = re.compile(r"^npm (?:error|ERR!) (?!code |errno |syscall |\s)(.+)", re.MULTILINE)


def missing_program(name: str) -> str | None:
    """Why ``name``, a program of Node.js, cannot be started, or None."""
    return None if shutil.which(name) else f"{name} is not on the PATH: install Node.js 20 or later"


def install(name: str, source: Path, folder: Path) -> None:
    """Install the packages that ``source`` locks.

    The lock file names versions and hashes but no host: npm asks the registry that the user set.

    Args:
        name: what is installed, for messages.
        source: the folder of ``package.json`` and ``package-lock.json``.
        folder: an empty folder, which then holds them and ``node_modules``.

    Raises:
        Unsupported: when node or npm is missing, or npm fails, with npm's reason.
    """
    for program in ("node", "npm"):
        if missing := missing_program(program):
            raise Unsupported(f"{name}: {missing}")
    for file in ("package.json", "package-lock.json"):
        shutil.copyfile(source / file, folder / file)
    npm = shutil.which("npm")
    assert npm is not None
    # onnxruntime-node has a script that downloads a library for CUDA
    options = ("--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1")
    done = installer.run(name, [npm, "ci", *options], folder=folder)
    if done.returncode:
        match = _ERROR.search(done.stderr)
        reason = match[1] if match else f"exit code {done.returncode}"
        raise Unsupported(
            f"{name}: npm cannot install it: {reason}: "
            "see with `npm ping` whether npm reaches its registry"
        )
