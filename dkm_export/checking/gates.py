"""What a check is held to: thresholds, and whether a file or the command line set them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, FiniteFloat

from dkm_export.checking.metrics import LIMITS, Limits, NotNegative
from dkm_export.checking.runtime import NumericClass
from dkm_export.settings import read_toml
from dkm_export.spec import Frozen
from dkm_export.validation import validated

ALL = "all"
"""In ``max_bytes``: every target that has no limit of its own."""

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z]*)")


class Threshold(Frozen):
    """The value of a gate, and what set it: the name of a file, or ``command line``."""

    value: FiniteFloat
    source: str


def _bytes(size: object) -> object:
    """``3.3 MB`` as a number of bytes; what is no text is left to pydantic."""
    if not isinstance(size, str):
        return size
    found = _SIZE.fullmatch(size)
    if not found or (found[2] or "B") not in _UNITS:
        raise ValueError(
            f"'{size}' is no size: write a number of bytes, or one with a unit of "
            f"{', '.join(_UNITS)}"
        )
    return int(Decimal(found[1]) * _UNITS[found[2] or "B"])


def _by_target(sizes: object) -> object:
    """A size without a target is that of all."""
    return {ALL: sizes} if isinstance(sizes, str | int) else sizes


Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=0, strict=True)]


class LimitChanges(Frozen):
    """Fields of `Limits` that a file sets; the others stay."""

    relative_l2: NotNegative | None = None
    rtol: NotNegative | None = None
    atol: NotNegative | None = None
    sqnr_db: Annotated[FiniteFloat, Field(strict=True)] | None = None


class GateSettings(Frozen):
    """Gates as a file or a command line sets them; what is left out stays as it is.

    Attributes:
        limits: how far outputs may be from PyTorch's, by numeric class.
        max_bytes: the largest artifact, by target or for ``all``: a number of bytes, or text with a
            unit, such as ``3.3 MB``.
        max_drop: how far the task's metric may fall below the uncompressed model's.
        require: runtimes that have to run.
    """

    limits: dict[NumericClass, LimitChanges] = Field(default_factory=dict)
    max_bytes: Annotated[dict[str, Bytes], BeforeValidator(_by_target)] = Field(
        default_factory=dict
    )
    max_drop: Annotated[FiniteFloat, Field(strict=True)] | None = None
    require: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gates:
    """All thresholds of a check.

    Attributes:
        limits: of every numeric class.
        max_bytes: by target, or `ALL`.
        max_drop: None when the metric may fall.
    """

    limits: Mapping[NumericClass, Limits] = field(default_factory=lambda: LIMITS)
    max_bytes: Mapping[str, Threshold] = field(default_factory=dict)
    max_drop: Threshold | None = None

    def changed(self, settings: GateSettings, source: str) -> Gates:
        """These gates, where ``settings`` name others; ``require`` is not among them."""
        limits = dict(self.limits)
        for numeric_class, changes in settings.limits.items():
            named = changes.model_dump(exclude_none=True)
            sources = dict[str, str](limits[numeric_class].sources.items())
            sources |= dict.fromkeys(named, source)
            limits[numeric_class] = limits[numeric_class].model_copy(
                update={**named, "sources": sources}
            )
        sizes = {
            target: Threshold(value=size, source=source)
            for target, size in settings.max_bytes.items()
        }
        drop = settings.max_drop
        return Gates(
            limits=limits,
            # a size for all takes the place of earlier ones of single targets
            max_bytes=sizes if ALL in sizes else {**self.max_bytes, **sizes},
            max_drop=self.max_drop if drop is None else Threshold(value=drop, source=source),
        )

    def size_limit(self, target: str) -> Threshold | None:
        """The most bytes that an artifact of ``target`` may have."""
        return self.max_bytes.get(target) or self.max_bytes.get(ALL)


def parse_gates(data: Mapping[str, Any], source: str) -> GateSettings:
    """Validate gates.

    Raises:
        InvalidInput: with ``source``, the key and what is allowed.
    """
    return validated(data, GateSettings, source)


def load_gates(path: Path) -> GateSettings:
    """Read a TOML file of gates.

    Raises:
        InvalidInput: when the file is missing or not TOML, or a key or value is wrong.
    """
    return parse_gates(read_toml(path), str(path))
