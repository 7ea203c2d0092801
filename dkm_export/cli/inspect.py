"""list what a checkpoint or an artifact of any tool stores, or what differs between two"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dkm_export.cli.terminal import Terminal, ratio, size
from dkm_export.errors import ExitCode

if TYPE_CHECKING:
    from dkm_export.comparison import Change
    from dkm_export.exporting import StoredTensor
    from dkm_export.inspection import Inspection

_MOST_DENSE = 20
_LONG_TO_ZIP = 1 << 25
"""Bytes from which on zipping takes more than a moment."""

_KEYS = ("encoding", "bits", "dim", "axis", "groups")
_BYTES = ("index_bytes", "lut_bytes", "scale_bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dkm inspect``."""
    parser.add_argument(
        "path",
        type=Path,
        metavar="FILE",
        help="a .dkm.safetensors, .mlpackage, .onnx, .ort or .pte, of any tool, or the folder of "
        "a run",
    )
    parser.add_argument(
        "--diff",
        type=Path,
        metavar="OTHER",
        help="list what is different in OTHER, which may be of another kind; differences are no "
        "failure, the exit code is 0",
    )


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``dkm inspect``."""
    from dkm_export.inspection import inspect

    found = [
        inspect(path, verbose=terminal.verbose)
        for path in (options.path, options.diff)
        if path is not None
    ]
    totals = [_totals(each, terminal) for each in found]
    if options.diff is not None:
        from dkm_export.comparison import compare

        _show_difference(found, totals, compare(*found), terminal)
    else:
        _show(found[0], totals[0], terminal)
    return ExitCode.OK


def _totals(found: Inspection, terminal: Terminal) -> dict[str, Any]:
    if found.bytes > _LONG_TO_ZIP:
        terminal.progress(f"{found.file}: zipping, to know the size of the download")
    account = found.account
    return {
        "bytes": found.bytes,
        "zipped_bytes": found.zipped(),
        "bytes_by_kind": found.totals,
        "paper_bytes": None if account is None else account.paper,
        "paper_ratio": None if account is None else round(account.paper_ratio, 3),
    }


def _show(found: Inspection, totals: dict[str, Any], terminal: Terminal) -> None:
    if terminal.json:
        terminal.result(
            {
                "file": str(found.file),
                **totals,
                "layers": {layer.name: _layer(layer) for layer in found.layers},
                "dense": {tensor.name: _dense(tensor) for tensor in found.dense},
                "not_taken_apart": dict(found.description.unread),
            }
        )
        return
    terminal.print(str(found.file))
    if found.layers:
        _print_layers(found.layers, terminal)
    _print_dense(found.dense, terminal)
    for what, count in found.description.unread.items():
        terminal.print(
            f"not taken apart: {what}, {'in another file' if count is None else size(count)}"
        )
    _print_totals(totals, terminal)


def _print_layers(layers: Sequence[StoredTensor], terminal: Terminal) -> None:
    noted = any(layer.reason for layer in layers)
    rows = []
    for layer in layers:
        entry = _layer(layer)
        numbers = (entry[key] for key in (*_KEYS, *_BYTES))
        cells = ("-" if value is None else value for value in numbers)
        weight = f"{layer.bits_per_weight:.2f}"
        rows.append((layer.name, _shape(layer), *cells, weight, *([layer.reason] * noted)))
    header = ("layer", "shape", *_KEYS, *_BYTES, "bits/weight", *(["note"] * noted))
    terminal.table("", header, rows)


def _print_dense(dense: Sequence[StoredTensor], terminal: Terminal) -> None:
    if not dense:
        return
    terminal.table(
        "",
        ("dense tensor", "shape", "type", "bytes", "why"),
        [(x.name, _shape(x), x.encoding, f"{x.nbytes:,}", x.reason) for x in dense[:_MOST_DENSE]],
    )
    rest = dense[_MOST_DENSE:]
    if rest:
        terminal.print(f"and {len(rest)} smaller ones, {size(sum(x.nbytes for x in rest))}")


def _print_totals(totals: dict[str, Any], terminal: Terminal) -> None:
    rows = [
        (kind, f"{count:,}", f"{100 * count / totals['bytes']:.1f}")
        for kind, count in totals["bytes_by_kind"].items()
        if count
    ]
    terminal.table("", ("in all", "bytes", "%"), rows)
    terminal.print(f"file: {size(totals['bytes'])}")
    terminal.print(
        f"zipped: {size(totals['zipped_bytes'])}, "
        f"{ratio(totals['bytes'], totals['zipped_bytes'])} smaller"
    )
    if totals["paper_bytes"] is not None:
        terminal.print(
            f"by the DKM paper's convention: {size(totals['paper_bytes'])}, "
            f"{totals['paper_ratio']:.1f}x smaller than float32"
        )


def _show_difference(
    found: Sequence[Inspection],
    totals: Sequence[dict[str, Any]],
    changes: Sequence[Change],
    terminal: Terminal,
) -> None:
    if terminal.json:
        terminal.result(
            {
                "files": [str(each.file) for each in found],
                "totals": list(totals),
                "changes": {change.name: _change(change) for change in changes if change.changed},
                "identical": [x.name for x in changes if not x.changed and x.compared],
                "values_not_compared": [
                    x.name for x in changes if not x.changed and not x.compared
                ],
            }
        )
        return
    terminal.print(f"from {found[0].file} to {found[1].file}")
    for title, is_layer in (("layer", True), ("dense tensor", False)):
        concerned = [change for change in changes if change.is_layer is is_layer]
        changed = [change for change in concerned if change.changed]
        if not is_layer:
            changed.sort(key=_largest, reverse=True)
        shown = changed if is_layer else changed[:_MOST_DENSE]
        rows = [(x.name, _in_short(x.before), _in_short(x.after), _differences(x)) for x in shown]
        if rows:
            terminal.table("", (title, "before", "after", "difference"), rows)
        if len(changed) > len(shown):
            terminal.print(f"and {len(changed) - len(shown)} smaller ones")
        alike = [change for change in concerned if not change.changed]
        unknown = sum(not change.compared for change in alike)
        terminal.print(f"{title}s without a difference: {len(alike) - unknown}")
        if unknown:
            terminal.print(f"{title}s alike, but values not compared: {unknown}")
    rows = []
    for key in (*totals[0]["bytes_by_kind"], "bytes", "zipped_bytes", "paper_bytes"):
        before, after = (x["bytes_by_kind"].get(key, x.get(key)) for x in totals)
        rows.append((_TOTALS.get(key, key), *map(_count, (before, after)), _gain(before, after)))
    terminal.table("", ("in bytes", "before", "after", "change"), rows)


_TOTALS = {
    "bytes": "file",
    "zipped_bytes": "zipped",
    "paper_bytes": "by the DKM paper's convention",
}


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _gain(before: int | None, after: int | None) -> str:
    return "-" if before is None or after is None else f"{after - before:+,}"


def _largest(change: Change) -> int:
    return max(side.nbytes for side in (change.before, change.after) if side is not None)


def _in_short(tensor: StoredTensor | None) -> str:
    return "-" if tensor is None else f"{tensor.encoding}, {tensor.nbytes:,} B"


def _differences(change: Change) -> str:
    if change.before is None:
        return "added"
    if change.after is None:
        return "removed"
    palette = [] if change.palette is None else [f"LUT and indices: {change.palette}"]
    return "; ".join((*palette, *change.differences))


def _change(change: Change) -> dict[str, Any]:
    sides = {
        key: None if tensor is None else _dense(tensor) if tensor.bits is None else _layer(tensor)
        for key, tensor in (("before", change.before), ("after", change.after))
    }
    return sides | {"palette": change.palette, "differences": list(change.differences)}


def _shape(tensor: StoredTensor) -> str:
    return "x".join(map(str, tensor.shape))


def _layer(tensor: StoredTensor) -> dict[str, Any]:
    return {
        "shape": tensor.shape,
        "encoding": tensor.encoding,
        "bits": tensor.bits,
        "dim": tensor.dim,
        "axis": tensor.axis,
        "groups": tensor.groups,
        "index_bytes": tensor.value_bytes,
        "lut_bytes": tensor.lut_bytes,
        "scale_bytes": tensor.scale_bytes,
        "reason": tensor.reason,
    }


def _dense(tensor: StoredTensor) -> dict[str, Any]:
    return {
        "shape": tensor.shape,
        "dtype": tensor.encoding,
        "bytes": tensor.nbytes,
        "reason": tensor.reason,
    }
