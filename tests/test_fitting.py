from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pytest
from numpy.random import Generator

from dkm_export.errors import InvalidInput
from dkm_export.planning.allocation import Allocation, Options
from dkm_export.planning.costs import Costs
from dkm_export.planning.fitting import MOST_MEASUREMENTS, fit

LAYERS, CHOICES = 4, 6
DENSE = 5_000
"""Bytes that no plan changes, as `fit` is told."""


def costs_of(options: Sequence[Options]) -> Costs:
    return Costs(options, [[frozenset()] * CHOICES for _ in options], {})


def with_decoders(options: Sequence[Options], generator: Generator) -> list[Options]:
    return [Options([c + int(generator.integers(400)) for c in x.costs], x.errors) for x in options]


def largest(options: Sequence[Options]) -> Options:
    """Of one layer, in files of several targets."""
    costs = [max(costs) for costs in zip(*(x.costs for x in options), strict=True)]
    return Options(costs, options[0].errors)


class Files:
    """What files take: by choice as costs tell, but for padding and something constant."""

    def __init__(self, seed: int, targets: Sequence[str]) -> None:
        generator = np.random.default_rng(seed)
        palettes = [
            Options(
                np.sort(generator.integers(100, 20_000, CHOICES)).tolist(),
                np.sort(generator.exponential(1, CHOICES))[::-1].tolist(),
            )
            for _ in range(LAYERS)
        ]
        files = {target: with_decoders(palettes, generator) for target in targets}
        self.each = {target: costs_of(options) for target, options in files.items()}
        self.together = costs_of([largest(same) for same in zip(*files.values(), strict=True)])
        self.unknown = {target: int(generator.integers(-300, 900)) for target in targets}
        self.measured: list[tuple[int, ...]] = []

    def sizes(self, choices: Sequence[int]) -> Mapping[str, int]:
        return {
            target: DENSE + self.unknown[target] + -(-costs.allocation(choices).cost // 64) * 64
            for target, costs in self.each.items()
        }

    def measure(self, chosen: Allocation) -> Mapping[str, int]:
        self.measured.append(chosen.choices)
        return self.sizes(chosen.choices)


@pytest.mark.parametrize("targets", [("one",), ("one", "other")])
@pytest.mark.parametrize("seed", range(10))
def test_nothing_much_better_fits(seed: int, targets: Sequence[str]) -> None:
    files = Files(seed, targets)
    plans = [
        (max(files.sizes(choices).values()), files.together.allocation(choices).error)
        for choices in product(range(CHOICES), repeat=LAYERS)
    ]
    for limit in (20_000, 30_000, 45_000, 200_000):
        files.measured.clear()
        fitting = [error for size, error in plans if size <= limit]
        if not fitting:
            with pytest.raises(InvalidInput, match="nothing fits into"):
                fit(files.together, files.each, limit, DENSE, files.measure)
            continue
        found = fit(files.together, files.each, limit, DENSE, files.measure)
        assert len(files.measured) == len(set(files.measured)) <= MOST_MEASUREMENTS
        assert found.sizes == files.sizes(found.allocation.choices)
        assert max(found.sizes.values()) <= limit
        smaller = [error for size, error in plans if size <= 0.98 * limit]
        assert min(fitting) <= found.allocation.error <= min(smaller, default=np.inf)
