from __future__ import annotations

from itertools import product
from operator import ne

import numpy as np
import pytest

from dkm_export.planning.allocation import Allocation, Knapsack, Options, front, lower_bound
from dkm_export.planning.costs import Costs


def allocate(layers: list[Options], budget: int) -> Allocation | None:
    return Costs(layers, [[frozenset()] * len(x.costs) for x in layers], {}).allocate(budget)


def random_layers(generator: np.random.Generator, layers: int, most: int) -> list[Options]:
    return [
        Options(
            [int(cost) for cost in generator.integers(1, most, 4)],
            [float(error) for error in generator.exponential(1, 4)],
        )
        for _ in range(layers)
    ]


def all_plans(layers: list[Options]) -> list[tuple[int, float]]:
    return [
        (
            sum(layer.costs[option] for layer, option in zip(layers, choices, strict=True)),
            sum(layer.errors[option] for layer, option in zip(layers, choices, strict=True)),
        )
        for choices in product(range(4), repeat=len(layers))
    ]


@pytest.mark.parametrize("seed", range(30))
def test_nothing_beats_an_allocation(seed: int) -> None:
    generator = np.random.default_rng(seed)
    layers = random_layers(generator, 4, 60)
    plans = all_plans(layers)
    knapsack = Knapsack(layers, 150)
    for budget in (0, 30, 80, 120, 150):
        fitting = [error for cost, error in plans if cost <= budget]
        found = knapsack.at(budget)
        assert allocate(layers, budget) == found
        if not fitting:
            assert found is None
            continue
        assert found is not None
        assert found.cost <= budget
        assert found.error == pytest.approx(min(fitting))
        assert lower_bound(layers, found.cost) <= found.error * (1 + 1e-12)
        assert lower_bound(layers, budget) <= min(fitting) * (1 + 1e-12)
        assert found.cost == sum(
            layer.costs[option] for layer, option in zip(layers, found.choices, strict=True)
        )


def test_large_budgets_are_kept_and_nearly_optimal() -> None:
    small = random_layers(np.random.default_rng(0), 60, 3_000)
    large = [Options([1000 * cost for cost in layer.costs], layer.errors) for layer in small]
    for budget in (35_000, 40_000, 80_000):
        found, exact = allocate(large, 1000 * budget), allocate(small, budget)
        assert found is not None
        assert exact is not None
        assert found.cost <= 1000 * budget
        assert lower_bound(large, 1000 * budget) <= exact.error <= found.error
        # a layer loses less than one of the 2**17 buckets
        less = allocate(small, budget - 60 * (1 + 1000 * budget // 2**17) // 1000 - 1)
        assert less is not None
        assert found.error <= less.error


def test_an_ample_budget_gives_every_layer_its_best() -> None:
    layers = random_layers(np.random.default_rng(0), 60, 1_000_000)
    least = sum(min(layer.errors) for layer in layers)
    enough = sum(max(layer.costs) for layer in layers)
    for budget in (enough, 10**15):
        found = allocate(layers, budget)
        assert found is not None
        assert found.error == pytest.approx(least)


def test_equal_and_worthless_choices() -> None:
    same = Options([5, 5, 3], [1.0, 1.0, 1.0])
    free = Options([9, 2], [0.0, 0.0])
    found = allocate([same, free], 10**18)
    assert found is not None
    assert (found.cost, found.error) == (5, 1.0)
    assert [point.cost for point in front([same, free])] == [5]
    assert allocate([same], 3) is not None
    assert allocate([same], 2) is None
    huge = Options([1, 2], [1e60, 5e-324])
    assert [point.error for point in front([huge])] == [1e60, 5e-324]
    assert lower_bound([huge], 1) == 1e60


def test_the_front_ascends_and_nothing_beats_it() -> None:
    layers = random_layers(np.random.default_rng(3), 4, 60)
    points = front(layers)
    assert points == sorted(points, key=lambda point: point.cost)
    assert points == sorted(points, key=lambda point: -point.error)
    plans = all_plans(layers)
    for point in points:
        assert not any(cost <= point.cost and error < point.error - 1e-12 for cost, error in plans)
    assert points[0].cost == min(cost for cost, _ in plans)
    assert points[-1].error == pytest.approx(min(error for _, error in plans))


@pytest.mark.parametrize("seed", range(10))
def test_what_is_shared_counts_once(seed: int) -> None:
    generator = np.random.default_rng(seed)
    layers = random_layers(generator, 4, 60)
    shared = {"large": 700, "table": 600, "small": 40, "tiny": 9}
    names = list(shared)
    needs = [
        [frozenset(name for name in names if generator.random() < 0.4) for _ in range(4)]
        for _ in layers
    ]
    costs = Costs(layers, needs, shared)
    plans = [costs.allocation(choices) for choices in product(range(4), repeat=4)]
    # nearly: what is small counts for every layer where plans are compared
    smallest = min(plan.cost for plan in plans)
    assert smallest <= costs.smallest().cost <= smallest + 49
    for budget in (100, 300, 700, 900, 1500, 10_000):
        found = costs.allocate(budget)
        assert found or budget < smallest + 49
        if found:
            least = min(plan.error for plan in plans if plan.cost <= budget)
            less = min(plan.error for plan in plans if plan.cost <= max(smallest, budget - 4 * 49))
            assert found.cost <= budget
            assert least <= found.error <= less + 1e-9
            assert found == costs.allocation(found.choices)
            # no other choices for two layers are better
            for plan in (plan for plan in plans if plan.cost <= budget):
                changed = sum(map(ne, plan.choices, found.choices))
                assert changed > 2 or found.error <= plan.error + 1e-9
