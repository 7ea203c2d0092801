"""write a checkpoint as Core ML, ONNX or ExecuTorch artifacts"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dkm_export.cli.data import add_data_arguments, task_data
from dkm_export.cli.terminal import Terminal, ratio, size
from dkm_export.errors import ExitCode, InvalidInput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dkm export``."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="RUN|FILE", help="a .dkm.safetensors or its folder"
    )
    parser.add_argument(
        "--target",
        action="append",
        required=True,
        metavar="TARGET",
        help="coreml, onnx, ort, executorch or all (`dkm targets` lists them); may be repeated",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TARGET.KEY=VALUE",
        help="option of a target, such as coreml.precision=fp32",
    )
    add_data_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="only ask whether the targets can")


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``dkm export``."""
    settings = _settings(options.set)
    if options.dry_run:
        return _show_plan(options, settings, terminal)
    if options.output is None:
        raise InvalidInput("name the folder to make: -o OUT")
    from dkm_export.exporting.export import export

    manifest = export(
        options.checkpoint,
        options.target,
        options.output,
        force=options.force,
        settings=settings,
        data=task_data(options),
        progress=terminal.progress,
        verbose=terminal.verbose,
    )
    if terminal.json:
        terminal.result({"output": str(options.output), "manifest": manifest.model_dump()})
        return ExitCode.OK
    terminal.table(
        f"exported {manifest.contents.name} to {options.output}",
        ("target", "file", "bytes", "ratio to fp32"),
        [
            (a.target, a.path, size(a.bytes), ratio(manifest.contents.fp32_bytes, a.bytes))
            for a in manifest.artifacts
        ],
    )
    return ExitCode.OK


def _settings(texts: list[str]) -> dict[str, dict[str, Any]]:
    from dkm_export.settings import parse_setting

    settings: dict[str, dict[str, Any]] = {}
    for text in texts:
        path, value = parse_setting(text)
        if len(path) != 2:
            raise InvalidInput(f"'{text}' is not an option of a target: write target.key=value")
        settings.setdefault(path[0], {})[path[1]] = value
    return settings


def _show_plan(
    options: argparse.Namespace, settings: dict[str, dict[str, Any]], terminal: Terminal
) -> int:
    from dkm_export.exporting.export import plan_export

    plan = plan_export(options.checkpoint, options.target, settings)
    palettes = sum(palette.nbytes for palette in plan.model.palettes.values())
    dense = sum(tensor.nbytes for tensor in plan.model.dense.values())
    names = [exporter.target for exporter, _ in plan.targets]
    if terminal.json:
        terminal.result({"targets": names, "palette_bytes": palettes, "dense_bytes": dense})
        return ExitCode.OK
    terminal.print(f"{', '.join(names)}: can hold all {len(plan.model.palettes)} palettes")
    terminal.print(
        f"payload: palettes {size(palettes)} + dense {size(dense)}, the graph comes on top"
    )
    return ExitCode.OK
