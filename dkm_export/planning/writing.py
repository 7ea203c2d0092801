"""The recipe that a plan makes of another one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from dkm_export.planning.result import Plan
from dkm_export.spec import CompressionSpec, LayerRule
from dkm_export.training.recipe import read_recipe


def planned_recipe(
    recipe: Path, overrides: Sequence[str], spec: CompressionSpec, plan: Plan
) -> str:
    """TOML: all of the recipe but its compression, which is the plan's, a line for each layer.

    Args:
        recipe: the file that was planned for.
        overrides: of its keys, as text.
        spec: the plan's.
        plan: explains the lines.
    """
    data = read_recipe(recipe, overrides)
    data.pop("compression", None)
    sizes = ", ".join(f"{target} {count:,} bytes" for target, count in plan.bytes.items())
    lines = [
        f"# Planned by `dkm plan` for {plan.budget}: {sizes}.",
        f"# Sensitivities: {plan.calibration}.",
        tomli_w.dumps(data),
        "[compression]",
        "small_layer_size = 0  # every layer has its own rule",
        f"small_layer_bits = {spec.small_layer_bits}",
        "rules = [",
        *(f"    {_inline(rule)},{_reason(rule, plan)}" for rule in spec.rules),
        "]",
    ]
    return "\n".join(lines) + "\n"


def _inline(rule: LayerRule) -> str:
    values = rule.model_dump(mode="json", exclude_defaults=True)
    # JSON's strings, numbers and booleans are TOML's too
    pairs = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return f"{{ {', '.join(pairs)} }}"


def _reason(rule: LayerRule, plan: Plan) -> str:
    """How much of the bytes and of the error a layer takes, as a comment."""
    for layer in plan.layers:
        if rule.matches(layer.name, layer.kind):
            share = 100 * layer.error / plan.error if plan.error else 0.0
            return f"  # {layer.bytes:,} B, {share:.1f} % of the error"
    return ""
