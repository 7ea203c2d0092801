"""list the palettes of a checkpoint or an artifact"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dkm_export.cli.terminal import Terminal, size
from dkm_export.entry import PaletteEntry
from dkm_export.errors import ExitCode

if TYPE_CHECKING:
    from dkm_export.palette import Palette


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dkm inspect``."""
    parser.add_argument(
        "path",
        type=Path,
        metavar="FILE",
        help="a .dkm.safetensors, .mlpackage, .onnx or .pte, or the folder of a run",
    )


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``dkm inspect``."""
    from dkm_export.inspection import inspect

    file, total, palettes = inspect(options.path, verbose=terminal.verbose)
    payload = sum(palette.nbytes for palette in palettes.values())
    if terminal.json:
        terminal.result(
            {
                "file": str(file),
                "bytes": total,
                "palette_bytes": payload,
                "layers": {name: _describe(palette) for name, palette in palettes.items()},
            }
        )
        return ExitCode.OK
    rows = []
    for name, palette in palettes.items():
        entry = _describe(palette)
        shape = "x".join(map(str, palette.layout.shape))
        rows.append((name, shape, *(entry[key] for key in _KEYS)))
    terminal.table(str(file), ("layer", "shape", *_KEYS), rows)
    terminal.print(
        f"palettes {size(payload)}, everything else {size(total - payload)}, file {size(total)}"
    )
    return ExitCode.OK


_KEYS = ("bits", "dim", "axis", "groups", "index_bytes", "lut_bytes")


def _describe(palette: Palette) -> dict[str, object]:
    sizes = {"index_bytes": palette.packed.nbytes, "lut_bytes": palette.lut.nbytes}
    return PaletteEntry.of(palette).model_dump(mode="json") | sizes
