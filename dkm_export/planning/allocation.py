"""One choice per layer with the least total error that a number of bytes allows.

That is the multiple-choice knapsack problem: Kellerer, Pferschy and Pisinger, "Knapsack Problems",
Springer 2004, chapter 11. Everything here is numbers; it knows no layer and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_BUCKETS = 1 << 17
"""Sizes that the dynamic programming tells apart; so many more bytes are rounded up."""


@dataclass(frozen=True)
class Options:
    """What one layer can choose from: bytes and error of each choice, each ``[choices]``."""

    costs: Sequence[int]
    errors: Sequence[float]


@dataclass(frozen=True)
class Allocation:
    """A choice for every layer.

    Attributes:
        choices: by layer, the number of its option.
        cost: bytes of all layers together.
        error: of all layers together.
    """

    choices: tuple[int, ...]
    cost: int
    error: float


class Knapsack:
    """The choices of least error within any number of bytes up to ``largest``.

    Optimal where that is up to `_BUCKETS` bytes over the smallest choices. With more, each layer
    is rounded up to whole buckets.
    """

    def __init__(self, layers: Sequence[Options], largest: int) -> None:
        self._layers = layers
        self._smallest = sum(min(layer.costs) for layer in layers)
        room = min(largest, sum(max(layer.costs) for layer in layers)) - self._smallest
        self._unit = -(-room // _BUCKETS) or 1
        self._taken: list[NDArray[np.int32]] = []
        if room < 0:
            return
        best = np.zeros(room // self._unit + 1)  # error by buckets over the smallest choices
        for layer in layers:
            total, which = np.full_like(best, np.inf), np.zeros(len(best), np.int32)
            for option in _undominated(layer):
                more = self._buckets(layer, option)
                if more < len(best):
                    candidate = best[: len(best) - more] + layer.errors[option]
                    better = candidate < total[more:]
                    total[more:][better], which[more:][better] = candidate[better], option
            best = total
            self._taken.append(which)

    def at(self, budget: int) -> Allocation | None:
        """The least error within ``budget`` bytes, or None when not even the smallest fit."""
        if budget < self._smallest:
            return None
        place = min((budget - self._smallest) // self._unit, len(self._taken[0]) - 1)
        choices = []
        for layer, which in zip(reversed(self._layers), reversed(self._taken), strict=True):
            option = int(which[place])
            place -= self._buckets(layer, option)
            choices.append(option)
        return _allocation(self._layers, list(reversed(choices)))

    def _buckets(self, layer: Options, option: int) -> int:
        """How many more than the smallest choice takes."""
        return -(-(layer.costs[option] - min(layer.costs)) // self._unit)


def lower_bound(layers: Sequence[Options], budget: int) -> float:
    """No choice within ``budget`` bytes has a smaller error: that of fractions of options."""
    points = front(layers)
    costs, errors = [point.cost for point in points], [point.error for point in points]
    return float(np.interp(budget, costs, errors))


def front(layers: Sequence[Options]) -> list[Allocation]:
    """Choices that nothing of their size beats, from the smallest to the least error.

    Those on the convex hull, each a step of one layer larger than the one before; the steps that
    spare most error for a byte come first.
    """
    hulls = [_hull(layer) for layer in layers]
    steps = []
    for number, (layer, hull) in enumerate(zip(layers, hulls, strict=True)):
        for place, (one, larger) in enumerate(pairwise(hull)):
            steps.append((_slope(layer, one, larger), number, place, larger))
    choices = [hull[0] for hull in hulls]
    points = [_allocation(layers, choices)]
    for _, number, _, option in sorted(steps):
        choices[number] = option
        points.append(_allocation(layers, choices))
    return points


def _hull(layer: Options) -> list[int]:
    """Options on the lower convex hull, by ascending bytes: each step spares less for a byte."""
    kept: list[int] = []
    for option in _undominated(layer):
        while len(kept) > 1 and _slope(layer, *kept[-2:]) >= _slope(layer, kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _slope(layer: Options, one: int, other: int) -> float:
    """Error for a byte from one option to a larger one; negative."""
    return (layer.errors[other] - layer.errors[one]) / (layer.costs[other] - layer.costs[one])


def _undominated(layer: Options) -> list[int]:
    """Options that no other one beats in bytes and error, by ascending bytes."""
    kept: list[int] = []
    for option in sorted(
        range(len(layer.costs)), key=lambda i: (layer.costs[i], layer.errors[i], i)
    ):
        if not kept or layer.errors[option] < layer.errors[kept[-1]]:
            kept.append(option)
    return kept


def _allocation(layers: Sequence[Options], choices: Sequence[int]) -> Allocation:
    pairs = list(zip(layers, choices, strict=True))
    return Allocation(
        tuple(choices),
        sum(layer.costs[option] for layer, option in pairs),
        sum(layer.errors[option] for layer, option in pairs),
    )
