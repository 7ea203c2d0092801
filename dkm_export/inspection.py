"""Look into a checkpoint or an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dkm_export.checkpoint import SUFFIX, find_checkpoint, load_checkpoint
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.exporting.exporter import Exporter
from dkm_export.palette import Palette
from dkm_export.plugins import EXPORTERS, discover
from dkm_export.quiet import quiet


def inspect(path: Path, *, verbose: bool = False) -> tuple[Path, int, Mapping[str, Palette]]:
    """The file looked at, its bytes (of all files, for a folder), and its palettes by layer.

    Raises:
        InvalidInput: when the path is missing, malformed or of no known kind.
        Unsupported: when reading it needs a package that is not installed.
    """
    exporters: dict[str, Exporter[Any]] = {e.suffix: e for e in discover(EXPORTERS).values()}
    if not path.exists():
        raise InvalidInput(f"{path}: no such file")
    if path.suffix in exporters:
        exporter = exporters[path.suffix]
        reason = exporter.unavailable()
        if reason:
            raise Unsupported(f"{path}: {reason}")
        with quiet(enabled=not verbose):
            palettes: Mapping[str, Palette] = exporter.read_palettes(path)
        files = exporter.files(path)
    else:
        path = find_checkpoint(path)
        if not path.name.endswith(SUFFIX):
            known = ", ".join((SUFFIX, *exporters))
            raise InvalidInput(f"{path}: unknown kind of file, known: {known}")
        palettes = load_checkpoint(path).palettes
        files = [path]
    return path, sum(file.stat().st_size for file in files), palettes
