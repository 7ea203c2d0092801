"""list the palettes of a checkpoint or an artifact, and what stayed dense"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dkm_export.cli.terminal import Terminal, size
from dkm_export.entry import PaletteEntry
from dkm_export.errors import ExitCode

if TYPE_CHECKING:
    from dkm_export.exporting import DenseTensor
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

    found = inspect(options.path, verbose=terminal.verbose)
    palettes, total = found.palettes, found.bytes
    dense = sorted(found.dense or (), key=lambda tensor: -tensor.nbytes)
    payload = sum(palette.nbytes for palette in palettes.values())
    if terminal.json:
        terminal.result(
            {
                "file": str(found.file),
                "bytes": total,
                "palette_bytes": payload,
                "layers": {name: _describe(palette) for name, palette in palettes.items()},
                "dense": None
                if found.dense is None
                else {
                    tensor.name: {
                        "shape": tensor.shape,
                        "dtype": tensor.dtype,
                        "bytes": tensor.nbytes,
                        "reason": tensor.reason,
                    }
                    for tensor in dense
                },
            }
        )
        return ExitCode.OK
    rows = []
    for name, palette in palettes.items():
        entry = _describe(palette)
        shape = "x".join(map(str, palette.layout.shape))
        rows.append((name, shape, *(entry[key] for key in _KEYS)))
    terminal.table(str(found.file), ("layer", "shape", *_KEYS), rows)
    _print_dense(dense, terminal)
    terminal.print(
        f"palettes {size(payload)}, everything else {size(total - payload)}, file {size(total)}"
    )
    return ExitCode.OK


def _print_dense(dense: Sequence[DenseTensor], terminal: Terminal) -> None:
    if not dense:
        return
    terminal.table(
        "without a palette",
        ("tensor", "shape", "type", "bytes", "why"),
        [
            (x.name, "x".join(map(str, x.shape)), x.dtype, f"{x.nbytes:,}", x.reason)
            for x in dense[:_MOST_DENSE]
        ],
    )
    rest = dense[_MOST_DENSE:]
    if rest:
        terminal.print(f"and {len(rest)} smaller ones, {size(sum(x.nbytes for x in rest))}")


_MOST_DENSE = 20
_KEYS = ("bits", "dim", "axis", "groups", "index_bytes", "lut_bytes")


def _describe(palette: Palette) -> dict[str, object]:
    sizes = {"index_bytes": palette.packed.nbytes, "lut_bytes": palette.lut.nbytes}
    return PaletteEntry.of(palette).model_dump(mode="json") | sizes
