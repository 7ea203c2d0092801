"""train a model with differentiable k-means as a recipe says, and save its palettes"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dkm_export.cli.terminal import Terminal, ratio, size
from dkm_export.errors import DkmError, ExitCode, InvalidInput
from dkm_export.files import CHECKPOINT, METRICS, require_replaceable, staged

if TYPE_CHECKING:
    from dkm_export.training.distributed import World
    from dkm_export.training.metrics import Metrics
    from dkm_export.training.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dkm compress``."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a .toml file, or the name of one that is installed"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="RUN", help="folder to make")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--resume", action="store_true", help="go on with a run of this output that was cut off"
    )
    parser.add_argument("--seed", type=int, help="instead of the recipe's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe's key"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and predicted bytes only"
    )


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``dkm compress``, also as one of several processes that torchrun started."""
    from dkm_export.training.distributed import meet, processes

    with processes() as world:
        try:
            return _run(options, terminal if world.leads else Terminal(quiet=True), world)
        except DkmError as error:
            if world.group is None:
                raise
            # All ranks have met it. torchrun ends them all once the first has ended, so that one
            # waits until rank 0 has said it.
            if world.leads:
                terminal.error(str(error), error.exit_code)
            meet(world)
            return error.exit_code


def _run(options: argparse.Namespace, terminal: Terminal, world: World) -> int:
    from dkm_export.checkpoint import save_checkpoint
    from dkm_export.training.distributed import together
    from dkm_export.training.recipe import find_recipe, load_recipe
    from dkm_export.training.resume import ResumeFile
    from dkm_export.training.stage import run_recipe

    overrides = options.set + ([] if options.seed is None else [f"seed={options.seed}"])
    with together(world):
        file = find_recipe(options.recipe)
        recipe = load_recipe(file, overrides)
        if options.dry_run:
            return _show_plan(recipe, terminal) if world.leads else ExitCode.OK
        if options.output is None:
            raise InvalidInput("name the folder to make: -o RUN")
        output, force = options.output, options.force
        weights = recipe.model.weights
        sources = [file, *([] if weights is None else [weights])]
        resume = ResumeFile.beside(output)
        if world.leads:
            require_replaceable(output, force=force, folder=True, sources=sources)
            resume.begin(resume=options.resume, force=force)
    with terminal.training_progress() as progress:
        model, metrics = run_recipe(recipe, progress, world=world, resume=resume)
    with together(world):
        if world.leads:
            with staged(output, force=force, folder=True, sources=sources) as folder:
                save_checkpoint(model, folder / CHECKPOINT)
                (folder / METRICS).write_text(metrics.model_dump_json(indent=2) + "\n")
            resume.end()
    if world.leads:
        _show_result(output / CHECKPOINT, metrics, terminal)
    return ExitCode.OK


def _show_result(file: Path, metrics: Metrics, terminal: Terminal) -> None:
    if terminal.json:
        terminal.result({"checkpoint": str(file), "metrics": metrics.model_dump(mode="json")})
        return
    account = metrics.sizes.account
    rows: list[tuple[str, object]] = [
        ("checkpoint", file),
        ("bytes", size(file.stat().st_size)),
        ("ratio to fp32", ratio(metrics.sizes.fp32, file.stat().st_size)),
        ("as the paper counts", f"{size(account.paper)}, {account.paper_ratio:.1f}x"),
    ]
    if metrics.fp32 is not None and metrics.hard is not None:
        rows += [
            (f"fp32 {metrics.metric}", f"{metrics.fp32:.2f}"),
            (f"palettized {metrics.metric}", f"{metrics.hard:.2f}"),
        ]
    if metrics.epochs:
        rows.append(("soft - hard gap", f"{metrics.epochs[-1].gap:+.2f}"))
    for name, value in rows:
        terminal.print(f"{name:<22} {value}")


def _show_plan(recipe: Recipe, terminal: Terminal) -> int:
    from dkm_export.training.stage import plan_recipe

    layers, account = plan_recipe(recipe)
    if terminal.json:
        terminal.result(
            {
                "layers": [
                    {
                        "name": layer.name,
                        "kind": layer.kind.value,
                        "shape": list(layer.layout.shape),
                        "bits": layer.bits,
                        "dim": layer.layout.dim,
                        "bytes": layer.nbytes,
                        "reason": layer.reason,
                    }
                    for layer in layers
                ],
                "account": account.model_dump(mode="json"),
                "bytes": account.stored,
            }
        )
        return ExitCode.OK
    terminal.table(
        f"plan for {recipe.model.name}",
        ("layer", "kind", "shape", "bits", "dim", "bytes", ""),
        [
            (
                layer.name,
                layer.kind,
                "x".join(map(str, layer.layout.shape)),
                layer.bits or "-",
                layer.layout.dim if layer.bits else "-",
                layer.nbytes,
                f"dense: {layer.reason}" if layer.reason else "",
            )
            for layer in layers
        ],
    )
    terminal.print()
    terminal.table(
        "predicted bytes",
        ("content", "stored", "as the paper counts"),
        [(line.kind, line.stored, line.paper) for line in account.lines],
    )
    terminal.print(f"checkpoint, without its header: {size(account.stored)}")
    terminal.print(f"as the paper counts: {size(account.paper)}, {account.paper_ratio:.1f}x")
    return ExitCode.OK
