"""find the bits, dim and groups of every layer that make the most of a size budget"""

from __future__ import annotations

import argparse
import math
import re
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from dkm_export.cli.terminal import Terminal, size
from dkm_export.errors import ExitCode, InvalidInput
from dkm_export.files import require_replaceable, staged

if TYPE_CHECKING:
    from dkm_export.planning.candidates import Setting
    from dkm_export.planning.planner import Question
    from dkm_export.planning.result import Plan

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|KB|MB|GB|KiB|MiB|GiB)?")
_UNITS = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_NO_FILE = 2**63
_DENSE = "dense"
"""How a weight without a palette is called."""

_FRONT = 12
"""Points of the front that are printed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dkm plan``."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a .toml file, or the name of one that is installed"
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--budget",
        type=_bytes,
        metavar="SIZE",
        help="bytes that no target's file may exceed: 3.3MB (a million bytes each), 3.15MiB, 65536",
    )
    budget.add_argument(
        "--bits-per-weight",
        type=_number,
        metavar="BITS",
        help="bits of indices and LUTs for each weight that may have a palette",
    )
    budget.add_argument(
        "--max-drop",
        type=_number,
        metavar="POINTS",
        help="the smallest plan that loses at most so much of the metric without fine-tuning",
    )
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="TARGET",
        help="a target that has to hold the plan and whose file counts (all: every one); may be "
        "repeated; without one, the checkpoint counts",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the recipe to write")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="PATTERN=SETTING",
        help="layers whose setting is given, as bits/dim, bits/dim/groups or dense",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        dest="pin",
        type=lambda pattern: f"{pattern}={_DENSE}",
        metavar="PATTERN",
        help="layers that stay dense: short for --pin PATTERN=dense",
    )
    parser.add_argument(
        "--settings", metavar="LIST", help="what layers choose from: 2/1,4/1,4/4,4/1/8"
    )
    parser.add_argument(
        "--sensitivities",
        type=Path,
        metavar="FILE",
        help="keep errors by layer and setting there, and use those that it has; may be edited",
    )
    method = parser.add_mutually_exclusive_group()
    method.add_argument(
        "--measure",
        action="store_const",
        const="measured",
        dest="method",
        help="palettize each layer alone and measure its errors (default for small networks)",
    )
    method.add_argument(
        "--no-measure",
        action="store_const",
        const="gradients",
        dest="method",
        help="predict errors from gradients (default for large networks)",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=128,
        metavar="COUNT",
        help="training examples to measure sensitivities on (default: 128)",
    )
    parser.add_argument("--seed", type=int, help="instead of the recipe's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a recipe's key, or an option of a target: coreml.precision=fp32",
    )


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``dkm plan``."""
    from dkm_export.planning.planner import Budget, make_plan
    from dkm_export.planning.writing import planned_recipe
    from dkm_export.training.recipe import as_recipe, find_recipe, read_recipe

    budget = Budget(options.budget, options.bits_per_weight, options.max_drop)
    if 0 in (budget.limit, budget.bits_per_weight):
        raise InvalidInput("the budget has to be more than 0")
    if options.examples < 1:
        raise InvalidInput(f"--examples {options.examples}: at least 1")
    question, overrides, settings = _question(options, terminal)
    file = find_recipe(options.recipe)
    content = read_recipe(file, overrides)
    recipe = as_recipe(content, file)
    output: Path | None = options.output
    kept: Path | None = options.sensitivities
    inputs = [file, *([recipe.model.weights] if recipe.model.weights else [])]
    if kept:
        require_replaceable(kept, force=True, sources=inputs)
    if output:
        sources = [*inputs, kept] if kept else inputs
        require_replaceable(output, force=options.force, sources=sources)
    with terminal.training_progress() as progress:
        plan, spec = make_plan(recipe, budget, question, progress)
    if output:
        with staged(output, force=options.force, sources=sources) as new:
            new.write_text(planned_recipe(content, spec, plan, settings))
    _show(plan, output, terminal)
    return ExitCode.OK


def _question(
    options: argparse.Namespace, terminal: Terminal
) -> tuple[Question, list[str], list[str]]:
    """What is asked for, the overrides of the recipe, and the settings of targets."""
    from dkm_export.exporting.export import choose_targets
    from dkm_export.planning.candidates import Setting
    from dkm_export.planning.planner import Question
    from dkm_export.plugins import EXPORTERS, names_of
    from dkm_export.settings import parse_setting

    targets = names_of(EXPORTERS)
    of_targets: dict[str, dict[str, object]] = {}
    overrides = [] if options.seed is None else [f"seed={options.seed}"]
    exporting = []
    for text in options.set:
        path, value = parse_setting(text)
        if path[0] in targets and len(path) == 2:
            of_targets.setdefault(path[0], {})[path[1]] = value
            exporting.append(text)
        else:
            overrides.append(text)
    pins = [_pin(text) for text in options.pin]
    settings: tuple[Setting, ...] = ()
    if options.settings is not None:
        parsed = (Setting.parse(text.strip()) for text in options.settings.split(","))
        settings = tuple(dict.fromkeys(parsed))
    question = Question(
        choose_targets(options.target, of_targets),
        settings,
        pins,
        options.method,
        options.examples,
        options.sensitivities,
        terminal.verbose,
    )
    return question, overrides, exporting


def _pin(text: str) -> tuple[str, Setting | None]:
    from dkm_export.planning.candidates import Setting

    pattern, equals, setting = text.rpartition("=")
    if not equals or not pattern:
        raise InvalidInput(
            f"'{text}' is no pin: write PATTERN=SETTING, such as 'head.*=8/1' or 'head.*={_DENSE}'"
        )
    return pattern, None if setting == _DENSE else Setting.parse(setting)


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no size: write a number and one of {', '.join(_UNITS)}"
        )
    count = int(Decimal(match[1]) * _UNITS[match[2] or "B"])
    if count >= _NO_FILE:
        raise argparse.ArgumentTypeError(f"'{text}' is more than a file can have")
    return count


def _number(text: str) -> float:
    number = float(text) if _NUMBER.fullmatch(text) else math.inf
    if math.isinf(number):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of at least 0")
    return number


def _show(plan: Plan, output: Path | None, terminal: Terminal) -> None:
    if terminal.json:
        result = {"output": str(output)} if output else {}
        terminal.result(result | {"plan": plan.model_dump(mode="json")})
        return
    terminal.table(
        f"plan for {plan.model}: {plan.budget}",
        ("layer", "kind", "shape", "bits", "dim", "groups", "bytes", "% of the error"),
        [
            (
                layer.name,
                layer.kind,
                "x".join(map(str, layer.shape)),
                layer.bits or "-",
                layer.dim if layer.bits else "-",
                layer.groups if layer.bits else "-",
                layer.bytes,
                f"{100 * layer.error / plan.error:.1f}" if plan.error else "0",
            )
            for layer in plan.layers
        ],
    )
    terminal.print()
    points = plan.front[:: -(-len(plan.front) // _FRONT)]
    terminal.table(
        "bytes of these layers against the predicted error",
        ("plan", "bytes", "error"),
        [
            (point.name, f"{point.bytes:,}", f"{point.error:.3g}")
            for point in sorted(
                (
                    *(point.model_copy(update={"name": "best"}) for point in points),
                    *(
                        point.model_copy(update={"name": f"all {point.name}"})
                        for point in plan.uniform
                    ),
                    plan.point,
                ),
                key=lambda point: point.bytes,
            )
        ],
    )
    terminal.print(
        f"predicted error {plan.error:.3g}, at least {plan.bound:.3g} for any plan with as many "
        "bytes for palettes; "
        f"errors of layers are {plan.calibration}"
    )
    for target, count in plan.bytes.items():
        share = f", {100 * count / plan.limit:.2f} % of the budget" if plan.limit else ""
        terminal.print(f"{target}: {size(count)}{share}, measured on a mock-up")
    if output:
        terminal.print(f"wrote {output}: `dkm compress {output} -o RUN` runs it")
