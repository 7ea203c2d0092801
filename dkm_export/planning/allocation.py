"""One choice per layer with the least total error that a number of bytes allows.

That is the multiple-choice knapsack problem: Kellerer, Pferschy and Pisinger, "Knapsack Problems",
Springer 2004, chapter 11. Everything here is numbers; it knows no layer and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BUCKETS = 1 << 17
"""Sizes that the dynamic programming tells apart; so many more bytes are rounded up."""

_PRICES = 200
"""Prices of a byte that the front and the bound try."""

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


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
    """No choice within ``budget`` bytes has a smaller error: the best dual of the relaxation.

    For any price of a byte, the least sum of errors and prices, less the price of the budget, is
    such a bound.
    """
    bounds = [sum(min(layer.errors) for layer in layers)]
    for price in _prices(layers):
        found = _cheapest(layers, price)
        bounds.append(found.error + price * (found.cost - budget))
    return max(bounds)


def front(layers: Sequence[Options]) -> list[Allocation]:
    """Choices that nothing of their size beats, from the smallest to the least error.

    Those on the convex hull, which are the best at a price of a byte.
    """
    found = {x.cost: x for x in (_cheapest(layers, price) for price in _prices(layers))}
    points: list[Allocation] = []
    for cost in sorted(found):
        if not points or found[cost].error < points[-1].error:
            points.append(found[cost])
    return points


def _prices(layers: Sequence[Options]) -> _Floats:
    """From nothing but bytes counting to nothing but errors counting."""
    errors = np.array([error for layer in layers for error in layer.errors])
    costs = np.array([cost for layer in layers for cost in layer.costs])
    span, least = float(np.ptp(costs)), float(errors[errors > 0].min(initial=1.0))
    most = max(float(errors.max()), least)
    return np.geomspace(2 * most, least / max(span, 1.0) / 2, _PRICES)


def _cheapest(layers: Sequence[Options], price: float) -> Allocation:
    return _allocation(
        layers,
        [
            int(np.argmin(np.asarray(layer.errors) + price * np.asarray(layer.costs, np.float64)))
            for layer in layers
        ],
    )


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
