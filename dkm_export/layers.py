"""Which weights of a model become palettes: the rules of a spec applied to its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from dkm_export.errors import InvalidInput
from dkm_export.palette import Layout, palette_size
from dkm_export.spec import CompressionSpec, LayerKind, Lut

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of weights that can be palettized."""


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer's weight.

    Attributes:
        name: full parameter name.
        kind: kind of the layer.
        layout: how the weight is cut into vectors.
        bits: bits per index, or None when the weight stays dense.
        reason: why it stays dense, or an empty string.
        tied_to: name of an earlier layer whose palette is this one's too, or an empty string.
        lut: what the centroids are rounded to.
        freeze: whether the palette is made once and not trained.
    """

    name: str
    kind: LayerKind
    layout: Layout
    bits: int | None
    reason: str = ""
    tied_to: str = ""
    lut: Lut = "float16"
    freeze: bool = False

    @property
    def nbytes(self) -> int:
        """Predicted payload: packed indices and float16 LUTs, or float32 weights; a tie is free."""
        if self.tied_to:
            return 0
        return 4 * self.layout.size if self.bits is None else palette_size(self.layout, self.bits)


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a layer, or None when its weight cannot be a palette."""
    match module:
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            depthwise = 1 < module.groups == module.in_channels
            return LayerKind.DEPTHWISE if depthwise else LayerKind.CONV
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            return LayerKind.CONV_TRANSPOSE
        case nn.Linear():
            return LayerKind.LINEAR
        case nn.Embedding():
            return LayerKind.EMBEDDING
    return None


def plan(model: nn.Module, spec: CompressionSpec) -> list[LayerPlan]:
    """Decide for every layer of ``model`` what its weight becomes.

    Raises:
        InvalidInput: when a rule's pattern matches no layer, a rule does not fit a weight's shape
            or dtype, or the layers of a tied weight are to become different palettes.
    """
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or is_lazy(tensor):
            raise InvalidInput(
                f"the model's state '{name}' is no tensor yet or none at all: "
                "run lazy modules once, and leave out get_extra_state"
            )
    layers = list(_layers(model))
    for number, rule in enumerate(spec.rules, 1):
        if rule.pattern != "*" and not any(rule.matches(name, kind) for name, kind, _ in layers):
            raise InvalidInput(
                f"rule {number}: pattern '{rule.pattern}' matches no layer, "
                f"the layers are {', '.join(name for name, _, _ in layers)}"
            )
    plans = [_plan_layer(name, kind, weight, spec) for name, kind, weight in layers]
    owners: dict[int, LayerPlan] = {}
    for index, (name, _, weight) in enumerate(layers):
        entry = plans[index]
        first = owners.setdefault(id(weight), entry)
        if first is not entry and (first.bits, entry.bits) != (None, None):
            same = (entry.bits, entry.layout, entry.lut, entry.freeze)
            if (first.bits, first.layout, first.lut, first.freeze) != same:
                raise InvalidInput(
                    f"{first.name} and {name} are one tied weight: give both the same bits, dim, "
                    "axis, groups, lut and freeze, or skip both"
                )
            plans[index] = replace(entry, tied_to=first.name)
        if entry.bits is not None and weight.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype) for dtype in _DTYPES)
            raise InvalidInput(
                f"{name} is {weight.dtype}, allowed: {allowed}: convert the model with .float()"
            )
    return plans


def dense_reasons(model: nn.Module, spec: CompressionSpec) -> dict[str, str]:
    """Why weights of layers stay dense, by parameter name."""
    return {entry.name: entry.reason for entry in plan(model, spec) if entry.reason}


def require_palettes(plans: Sequence[LayerPlan]) -> None:
    """Refuse a plan that leaves every layer dense.

    Raises:
        InvalidInput: with the reasons.
    """
    if all(entry.bits is None for entry in plans):
        reasons = "; ".join(sorted({entry.reason for entry in plans})) or "it has no known layers"
        raise InvalidInput(f"no layer of the model becomes a palette: {reasons}")


def _layers(model: nn.Module) -> Iterator[tuple[str, LayerKind, nn.Parameter]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        kind = kind_of(module)
        if kind is None:
            continue
        name = f"{prefix}.weight" if prefix else "weight"
        if parametrize.is_parametrized(module, "weight"):
            raise InvalidInput(f"{name} is parametrized already: prepare a model only once")
        if isinstance(module.weight, nn.Parameter):
            yield name, kind, module.weight


def _plan_layer(
    name: str, kind: LayerKind, weight: nn.Parameter, spec: CompressionSpec
) -> LayerPlan:
    shape = tuple(weight.shape)
    rule = spec.rule_for(name, kind, weight.numel())
    if rule is None or rule.bits is None:
        return LayerPlan(name, kind, Layout(shape), None, "no rule asks for a palette")
    try:
        layout = Layout(shape, rule.dim, rule.axis, rule.groups)
    except InvalidInput as error:
        raise InvalidInput(f"{name}: {error}") from error
    if palette_size(layout, rule.bits) >= 2 * layout.size:
        return LayerPlan(name, kind, layout, None, "a palette would be no smaller than float16")
    return LayerPlan(name, kind, layout, rule.bits, lut=rule.lut, freeze=rule.freeze)
