"""What each layer can choose from: settings that fit its shape and that every target can hold."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Self

import numpy as np
from torch import nn

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.exporting import Exporter, Overhead
from dkm_export.layers import LayerPlan, plan
from dkm_export.palette import (
    MAX_BITS,
    MAX_DIM,
    Layout,
    Palette,
    lut_size,
    packed_size,
    palette_size,
)
from dkm_export.spec import CompressionSpec, Frozen, LayerKind, LayerRule

Targets = Sequence[tuple[Exporter[Any], Frozen]]
"""Exporters with their options."""

_DENSE_BELOW = 4096
"""Weights: where a LUT takes a notable share of the bytes."""

_SETTING = re.compile(r"(\d{1,3})/(\d{1,3})(?:/(\d{1,9}))?")


@dataclass(frozen=True, order=True)
class Setting:
    """Bits, dim and groups of a palette; as text ``4/2``, or ``4/2/8`` with 8 groups."""

    bits: int
    dim: int = 1
    groups: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text of a setting.

        Raises:
            InvalidInput: when it is none.
        """
        match = _SETTING.fullmatch(text)
        numbers = [int(number) for number in match.groups(default="1")] if match else [0, 0, 0]
        found = cls(*numbers)
        if not (1 <= found.bits <= MAX_BITS and 1 <= found.dim <= MAX_DIM and found.groups):
            raise InvalidInput(
                f"'{text}' is no setting: write bits/dim or bits/dim/groups, bits 1 to {MAX_BITS}, "
                f"dim 1 to {MAX_DIM}"
            )
        return found

    def coarser(self) -> Iterator[Setting]:
        """The same with fewer groups, each of which is some of these groups together."""
        for groups in range(1, self.groups):
            if self.groups % groups == 0:
                yield replace(self, groups=groups)

    def __str__(self) -> str:
        groups = f"/{self.groups}" if self.groups > 1 else ""
        return f"{self.bits}/{self.dim}{groups}"


DEFAULT_SETTINGS = (
    *(Setting(bits, 1) for bits in (1, 2, 3, 4, 5, 6, 8)),
    *(Setting(bits, 1, 8) for bits in (2, 3)),
    *(Setting(bits, 2) for bits in (2, 3, 4, 6)),
    *(Setting(bits, 4) for bits in (4, 5, 6, 8)),
    *(Setting(bits, 8) for bits in (6, 8)),
)
"""What layers choose from unless told otherwise."""

_FINE_SETTINGS = (
    *(Setting(bits, 1, groups) for bits in (2, 3, 4, 6, 8) for groups in (2, 4, 16)),
    *(Setting(bits, 2, groups) for bits in (2, 3, 4, 5, 6) for groups in (2, 3, 4)),
    *(Setting(bits, 4, groups) for bits in (3, 4, 5, 6) for groups in (2, 3, 4)),
    *(Setting(bits, 1, 8) for bits in (1, 4)),
    *(Setting(bits, 2) for bits in (5, 7)),
    *(Setting(bits, 4) for bits in (3, 7)),
    *(Setting(bits, 8) for bits in (4, 5, 7)),
)
"""What small layers choose from too."""

_FINEST_SETTINGS = (
    Setting(7),
    *(Setting(bits, 1, groups) for bits in (5, 7) for groups in (2, 4, 16)),
    *(Setting(bits, 1, 8) for bits in (5, 6)),
    *(Setting(bits, 2, 8) for bits in (2, 3, 4, 5, 6)),
    *(Setting(bits, 4, 8) for bits in (3, 4, 5, 6)),
)
"""And layers of small models, with LUTs for each one, two or four rows: see `_by_rows`."""

_ROW_BITS = (1, 2, 3, 4)
_ROWS = (1, 2, 4)

_SMALL_LAYER = 1 << 17
"""Weights; fewer of them take no time to cluster."""

_SMALL_MODEL = 1 << 20
"""Weights of all layers: where layers are few, steps between settings have to be small."""

Pins = Sequence[tuple[str, Setting | None]]
"""Patterns over parameter names with the setting of the layers they match; None is dense."""


@dataclass(frozen=True)
class Candidate:
    """A layer and what it can choose from.

    Attributes:
        names: its full parameter name, and those of layers that share the weight.
        rule: of the recipe, which gives axis, lut and freeze.
        settings: None stands for a dense weight.
    """

    names: tuple[str, ...]
    kind: LayerKind
    shape: tuple[int, ...]
    rule: LayerRule
    settings: tuple[Setting | None, ...]

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def size(self) -> int:
        """Number of weights."""
        return Layout(self.shape).size

    def layout(self, setting: Setting) -> Layout:
        """How the weight is cut."""
        return Layout(self.shape, setting.dim, self.rule.axis, setting.groups)

    def overhead(self, setting: Setting | None, targets: Targets) -> Overhead:
        """What decoding or a dense weight takes besides, of the targets together."""
        # a dense weight may be too small for the rule's axis
        layout = self.layout(setting) if setting else Layout(self.shape)
        bits = setting.bits if setting else None
        found = [
            (exporter.target, exporter.overhead(self.name, layout, bits, options))
            for exporter, options in targets
        ]
        shared = {
            f"{target} {key}": count for target, each in found for key, count in each.shared.items()
        }
        return Overhead(max((each.own for _, each in found), default=0), shared)

    def nbytes(self, setting: Setting | None) -> int:
        """Packed indices and float16 LUTs, or the float32 weight."""
        if setting is None:
            return 4 * self.size
        return palette_size(self.layout(setting), setting.bits)

    def rules(self, setting: Setting | None) -> list[LayerRule]:
        """The rules of a spec that give this setting to the layer, by each of its names."""
        patterns = [glob.escape(name) for name in self.names]
        if setting is None:
            return [LayerRule(pattern=pattern, skip=True) for pattern in patterns]
        update = {"kinds": None, "bits": setting.bits, "dim": setting.dim, "groups": setting.groups}
        return [self.rule.model_copy(update={"pattern": pattern} | update) for pattern in patterns]


def candidates(
    model: nn.Module,
    spec: CompressionSpec,
    settings: Sequence[Setting],
    pins: Pins,
    targets: Targets,
) -> list[Candidate]:
    """The layers that the rules of ``spec`` give a palette, each with what it can choose from.

    Without ``settings``, that is `DEFAULT_SETTINGS` and, for small layers and models, more.

    Small layers may also stay dense. Left out is what is never worth it: a LUT larger than its
    indices.

    Raises:
        InvalidInput: when a pin matches no layer or does not fit it, no setting fits a layer, or no
            layer may have a palette.
        Unsupported: when a target holds no setting of a layer, or not its pin.
    """
    small = spec.model_copy(update={"small_layer_size": 0})
    # also of weights that the recipe's own bits would leave dense
    tied: dict[int, list[LayerPlan]] = {}
    for layer in plan(model, spec):
        tied.setdefault(id(model.get_parameter(layer.name)), []).append(layer)
    whole = sum(layer.layout.size for layer, *_ in tied.values())
    found = []
    for layers in tied.values():
        layer, size = layers[0], layers[0].layout.size
        names = tuple(each.name for each in layers)
        rule = small.rule_for(layer.name, layer.kind, size)
        if rule is None:
            continue
        pinned = _pinned(names, pins)
        free: tuple[Setting | None, ...] = tuple(settings or DEFAULT_SETTINGS)
        if not settings and (size < _SMALL_LAYER or whole < _SMALL_MODEL):
            free = (*free, *_FINE_SETTINGS)
        if not settings and whole < _SMALL_MODEL:
            free = (*free, *_FINEST_SETTINGS, *_by_rows(layer.layout.shape[0]))
        if size < _DENSE_BELOW:
            free = (*free, None)
        offered = pinned or tuple(dict.fromkeys(free))
        candidate = Candidate(names, layer.kind, layer.layout.shape, rule, ())
        found.append(_offer(candidate, offered, targets, pinned=bool(pinned)))
    _require_matches(pins, [name for candidate in found for name in candidate.names])
    if not found:
        raise InvalidInput(
            "no layer may have a palette: the recipe's compression.rules say which ones may"
        )
    return found


def _by_rows(count: int) -> Iterator[Setting]:
    """LUTs for one or a few of a weight's rows: at few bits they spare much for their bytes."""
    for rows in _ROWS:
        if count % rows == 0:
            yield from (Setting(bits, 1, count // rows) for bits in _ROW_BITS)


def _offer(
    candidate: Candidate,
    offered: Sequence[Setting | None],
    targets: Targets,
    *,
    pinned: bool,
) -> Candidate:
    kept: list[Setting | None] = []
    reasons: list[str] = []
    unsupported = False
    for setting in offered:
        if setting is None:
            kept.append(None)
            continue
        misfit = _misfit(candidate, setting, pinned=pinned)
        if misfit and pinned:
            raise InvalidInput(f"{candidate.name} at {setting}: {misfit}")
        refusal = "" if misfit else _refusal(candidate, setting, targets)
        if refusal and pinned:
            raise Unsupported(f"{candidate.name} at {setting}: {refusal}")
        unsupported = unsupported or bool(refusal)
        if misfit or refusal:
            reasons.append(f"{setting}: {misfit or refusal}")
        else:
            kept.append(setting)
    if not kept:
        raise (Unsupported if unsupported else InvalidInput)(
            f"{candidate.name} cannot have any of its settings ({'; '.join(reasons[:3])}): "
            "offer others with --settings, or --exclude it"
        )
    return replace(candidate, settings=tuple(kept))


def _misfit(candidate: Candidate, setting: Setting, *, pinned: bool) -> str:
    """Why a layer should not have a setting whatever the target, or an empty string."""
    try:
        layout = candidate.layout(setting)
    except InvalidInput as error:
        return str(error)
    if palette_size(layout, setting.bits) >= 2 * layout.size:
        return "a palette would be no smaller than float16"
    if not pinned and lut_size(layout, setting.bits) > packed_size(layout.vectors, setting.bits):
        return "the LUT would be larger than the indices"
    return ""


def _refusal(candidate: Candidate, setting: Setting, targets: Targets) -> str:
    """Why a target cannot hold such a palette, or an empty string."""
    layout, bits = candidate.layout(setting), setting.bits
    value = 0 if candidate.rule.lut == "int8" else 1 / 3  # which is no int8 times a power of two
    lut = np.full((layout.groups, 1 << bits, layout.dim), value, np.float16)
    palette = Palette(bits, layout, lut, np.zeros(layout.index_shape, np.uint8))
    for exporter, options in targets:
        reason = exporter.refusal(palette, options)
        if reason:
            return f"{exporter.target}: {reason}"
    return ""


def _pinned(names: Sequence[str], pins: Pins) -> tuple[Setting | None, ...]:
    """The setting of the last pin that matches one of the names; nothing when none does."""
    for pattern, setting in reversed(pins):
        if any(fnmatchcase(name, pattern) for name in names):
            return (setting,)
    return ()


def _require_matches(pins: Pins, names: Sequence[str]) -> None:
    for pattern, _ in pins:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InvalidInput(
                f"pattern '{pattern}' matches no layer that may have a palette, "
                f"these may: {', '.join(names)}"
            )


def spec_of(
    chosen: Mapping[str, Setting | None], layers: Sequence[Candidate], spec: CompressionSpec
) -> CompressionSpec:
    """The spec that gives every layer what was chosen for it, and leaves all others dense."""
    rules = tuple(rule for layer in layers for rule in layer.rules(chosen[layer.name]))
    return spec.model_copy(update={"rules": rules, "small_layer_size": 0})
