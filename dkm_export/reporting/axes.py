"""Axes: where a value lies on a figure, which values are named there, and how they are written."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

_LOG_FROM = 20.0
"""A range over so many times its least value is easier to read on a logarithmic axis."""

_BYTES, _GAP = ("B", "kB", "MB", "GB", "TB"), "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Axis:
    """Maps ``low`` to ``start`` and ``high`` to ``end``, in pixels.

    Attributes:
        log: whether distances are ratios; both ends are above 0 then.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(
        cls,
        values: Iterable[float],
        start: float,
        end: float,
        *,
        margin: float = 0.06,
        may_be_log: bool = False,
    ) -> Axis:
        """An axis that shows all ``values``, with a share of its length as a margin."""
        found = list(values)
        low, high = min(found), max(found)
        if may_be_log and 1e-100 < low <= high < 1e100 and high / low > _LOG_FROM:
            room = (high / low) ** margin
            return cls(low / room, high * room, start, end, log=True)
        most = sys.float_info.max
        room = min(margin * (high - low), most) or abs(high) * 0.01 or 1.0
        return cls(max(low - room, -most), min(high + room, most), start, end)

    def at(self, value: float) -> float:
        """Where ``value`` lies."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            # halves, because the difference of two large numbers may be none
            share = (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """About ``most`` round values or fewer, ascending; two or more where that is possible."""
        if self.log:
            return _log_ticks(self.low, self.high, most)
        span = self.high - self.low
        if not 1e-300 < span < math.inf:
            return []
        step = _round_step(span / most)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        # one value alone would be no scale
        if last - first < 1 and most < 16:
            return self.ticks(2 * most)
        return [i * step for i in range(first, last + 1)]


def _round_step(least: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]


def labels(values: Sequence[float]) -> list[str]:
    """Ticks as they are written: with as few digits as tell them apart."""
    steps = [abs(b - a) for a, b in pairwise(values)]
    largest = max(map(abs, values), default=0.0)
    if not largest:
        return [signed(value, "g") for value in values]
    if largest >= 1e4 or largest < 1e-2:
        return [signed(value, ".3g") for value in values]
    # an even axis needs the digits of its step, another those of each value
    if steps and max(steps) < 1.5 * min(steps):
        digits = max(0, math.ceil(-math.log10(min(steps)) - 1e-9))
        return [signed(value, f".{digits}f") for value in values]
    return [signed(value, "g") for value in values]


def counts(values: Sequence[float]) -> list[str]:
    """Ticks of an axis of counts: ``20k``."""
    return [_scaled(value, ("", "k", "M", "G", "T"), "", ".3g") for value in values]


def sizes(values: Sequence[float]) -> list[str]:
    """Ticks of an axis of bytes: ``20 kB``."""
    return [_scaled(value, _BYTES, _GAP, ".3g") for value in values]


def size(count: float) -> str:
    """Bytes with a unit of powers of 1000, in three digits."""
    return _scaled(count, _BYTES, _GAP, "#.3g")


def signed(value: float, form: str) -> str:
    """A number with a real minus sign, and no sign before a zero."""
    text = format(value, form)
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def _scaled(value: float, units: Sequence[str], gap: str, form: str) -> str:
    power = 0
    # what would be written as 1000 is 1 of the next unit
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    text = f"{value:.0f}" if abs(value) >= 99.95 or not power else format(value, form)
    return f"{text}{gap}{units[power]}"


Label = Callable[[Sequence[float]], list[str]]
