"""The recipe that a plan makes of another one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w

from dkm_export.planning.result import Plan
from dkm_export.spec import CompressionSpec, LayerRule
from dkm_export.text import printable


def planned_recipe(
    recipe: Mapping[str, Any], spec: CompressionSpec, plan: Plan, settings: Sequence[str] = ()
) -> str:
    """TOML: all of the recipe but its compression, which is the plan's, a line for each layer.

    Args:
        recipe: that was planned for, as `read_recipe` gives it.
        spec: the plan's.
        plan: explains the lines.
        settings: options of targets that its bytes are those of, as ``--set`` takes them.
    """
    data = {key: value for key, value in recipe.items() if key != "compression"}
    sizes = ", ".join(f"{target} {count:,} bytes" for target, count in plan.bytes.items())
    lines = [
        f"# Planned by `dkm plan` for {plan.budget}: {sizes}.",
        *([f"# To be exported with{''.join(map(_option, settings))}."] if settings else []),
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


def _option(setting: str) -> str:
    return f" --set {printable(shlex.quote(setting))}"


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
