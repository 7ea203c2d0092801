"""One choice per layer with the least total error that a number of bytes allows.

That is the multiple-choice knapsack problem: Kellerer, Pferschy and Pisinger, "Knapsack Problems",
Springer 2004, chapter 11. Everything here is numbers; it knows no layer and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

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


def allocate(layers: Sequence[Options], budget: int) -> Allocation | None:
    """The least error within ``budget`` bytes, or None when not even the smallest choices fit.

    Optimal for budgets of up to `_BUCKETS` bytes over the smallest choices. Of larger ones each
    layer wastes less than a bucket, which `lower_bound` puts into perspective.
    """
    smallest = sum(min(layer.costs) for layer in layers)
    largest = sum(max(layer.costs) for layer in layers)
    if smallest > budget:
        return None
    room = min(budget, largest) - smallest
    unit = -(-room // _BUCKETS) or 1
    best = np.zeros(room // unit + 1)  # error by bytes over the smallest, in units
    taken = []
    for layer in layers:
        total, which = np.full_like(best, np.inf), np.zeros(len(best), np.int32)
        for option in _undominated(layer):
            more = -(-(layer.costs[option] - min(layer.costs)) // unit)
            if more < len(best):
                candidate = best[: len(best) - more] + layer.errors[option]
                better = candidate < total[more:]
                total[more:][better], which[more:][better] = candidate[better], option
        best = total
        taken.append(which)
    place, choices = len(best) - 1, []
    for layer, which in zip(reversed(layers), reversed(taken), strict=True):
        option = int(which[place])
        place -= -(-(layer.costs[option] - min(layer.costs)) // unit)
        choices.append(option)
    return _allocation(layers, list(reversed(choices)))


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
