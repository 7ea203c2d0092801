"""Programs that download packages for a runtime: apt, pip and npm."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from dkm_export.errors import Unsupported

_PATIENCE = 1800
"""Seconds for a download of some 300 MB."""


def run(
    name: str,
    command: Sequence[str],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program that asks nothing, to its end.

    Args:
        name: what it is for, for messages.
        command: the program and its arguments.
        folder: where it runs.
        environment: variables besides those of this process.

    Returns:
        Its exit code and what it wrote.

    Raises:
        Unsupported: when it takes too long.
    """
    try:
        return subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired as error:
        program, minutes = Path(command[0]).name, _PATIENCE // 60
        raise Unsupported(f"{name}: {program} has not finished within {minutes} minutes") from error
