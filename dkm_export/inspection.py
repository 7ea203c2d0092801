"""Look into a checkpoint or an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dkm_export.checkpoint import SUFFIX, find_checkpoint, load_checkpoint
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.exporting.exporter import DenseTensor, Exporter
from dkm_export.palette import Palette
from dkm_export.palettized import PalettizedModel
from dkm_export.plugins import EXPORTERS, discover
from dkm_export.quiet import quiet


@dataclass(frozen=True)
class Inspection:
    """What is in a file.

    Attributes:
        file: that was looked at.
        bytes: of the file, and of those that belong to it.
        palettes: by parameter name.
        dense: what is stored without a palette; None where the kind of file cannot tell.
    """

    file: Path
    bytes: int
    palettes: Mapping[str, Palette]
    dense: Sequence[DenseTensor] | None


def inspect(path: Path, *, verbose: bool = False) -> Inspection:
    """Read a checkpoint, the folder of a run, or an artifact.

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
            palettes, dense = exporter.read_palettes(path), exporter.read_dense(path)
        return Inspection(path, _size(exporter.files(path)), palettes, dense)
    path = find_checkpoint(path)
    if not path.name.endswith(SUFFIX):
        known = ", ".join((SUFFIX, *exporters))
        raise InvalidInput(f"{path}: unknown kind of file, known: {known}")
    model = load_checkpoint(path)
    return Inspection(path, _size([path]), model.palettes, _dense(model))


def _dense(model: PalettizedModel) -> list[DenseTensor]:
    """Without reasons: only the model's code could tell them, and to look at a file runs none."""
    return [
        DenseTensor(
            name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.nbytes, ""
        )
        for name, tensor in model.dense.items()
    ]


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)
