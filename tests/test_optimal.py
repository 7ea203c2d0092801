from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

from dkm_export.clustering import optimal
from dkm_export.clustering.optimal import optimal_centroids, optimal_tables


def _inertia(values: Tensor, centroids: Tensor, weights: Tensor | None = None) -> float:
    squared = (values.double()[:, None] - centroids).square().amin(1)
    return float((squared if weights is None else squared * weights).sum())


def _draw(kind: str, n: int, random: Generator) -> Tensor:
    """float32 values from a distribution."""
    side = random.choice([-1.0, 1.0], n)
    draws: dict[str, Callable[[], NDArray[np.float64]]] = {
        "normal": lambda: random.normal(size=n),
        "laplace": lambda: random.laplace(size=n),
        "student": lambda: random.standard_t(2, n),
        "cauchy": lambda: random.standard_cauchy(n),
        "mixture": lambda: np.where(side > 0, random.normal(0, 1e-3, n), random.normal(0, 1, n)),
        "uniform": lambda: random.uniform(size=n),
        "lumps": lambda: side + 1e-4 * random.normal(size=n),
        "decades": lambda: side * 10 ** random.uniform(-30, 30, n),
    }
    return torch.from_numpy(draws[kind]()).float()


_KINDS = ["normal", "laplace", "student", "cauchy", "mixture", "uniform", "lumps", "decades"]


def _least_inertia(values: Tensor, k: int, weights: Tensor) -> float:
    """By trying every way to cut the sorted values."""
    order = values.argsort()
    x, w, n = values[order], weights[order], len(values)
    least = float("inf")
    for inner in combinations(range(1, n), min(k, n) - 1):
        cost = 0.0
        for a, b in zip((0, *inner), (*inner, n), strict=True):
            mean = (w[a:b] * x[a:b]).sum() / w[a:b].sum().clamp(min=1e-9)
            cost += float((w[a:b] * (x[a:b] - mean).square()).sum())
        least = min(least, cost)
    return least


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.floats(-50, 50), st.integers(0, 5)), min_size=1, max_size=10),
    st.integers(1, 4),
    st.booleans(),
)
def test_nothing_is_better(points: list[tuple[float, int]], k: int, weighted: bool) -> None:
    values, weights = torch.tensor(points, dtype=torch.float64).unbind(1)
    if not weighted or not weights.any():
        weights = torch.ones_like(values)
    centroids = optimal_centroids(values, k, weights if weighted else None)
    assert centroids.shape == (k,)
    assert torch.equal(centroids, centroids.sort().values)
    least = _least_inertia(values, k, weights)
    assert _inertia(values, centroids, weights) == pytest.approx(least, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [4, 16, 64])
@pytest.mark.parametrize("kind", _KINDS)
def test_never_worse_than_scikit_learn(kind: str, k: int, weighted: bool) -> None:
    random = np.random.default_rng(0)
    values = _draw(kind, 12000, random)
    weights = torch.from_numpy(random.lognormal(0, 2, len(values))) if weighted else None
    ours = optimal_centroids(values, k, weights)
    peer = KMeans(k, n_init=10, random_state=0)
    peer.fit(values.double().numpy()[:, None], sample_weight=weights)
    theirs = torch.from_numpy(peer.cluster_centers_[:, 0])
    assert len(ours.unique()) == k
    assert _inertia(values, ours, weights) <= _inertia(values, theirs, weights) * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["normal", "laplace", "student", "lumps"])
def test_few_positions_are_enough(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 for each centroid, instead of 32."""
    values = _draw(kind, 50000, np.random.default_rng(1))
    best = _inertia(values, optimal_centroids(values, 128))
    monkeypatch.setattr(optimal, "_most_positions", lambda k: 4 * k)
    assert _inertia(values, optimal_centroids(values, 128)) <= best * 1.006


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_far_values_take_no_digits_from_the_rest(offset: float) -> None:
    inner = torch.from_numpy(np.random.default_rng(0).normal(size=3000)) + offset
    far = torch.tensor([-1e12, 1e12], dtype=torch.float64)
    centroids = optimal_centroids(torch.cat((inner, far)), 18)
    torch.testing.assert_close(centroids[[0, -1]], far, rtol=0, atol=0)
    alone = optimal_centroids(inner, 16)
    torch.testing.assert_close(centroids[1:-1] - offset, alone - offset, rtol=0, atol=1e-6)


def test_a_weight_is_a_number_of_repetitions() -> None:
    random = np.random.default_rng(0)
    values = torch.from_numpy(random.normal(size=500))
    counts = torch.from_numpy(random.integers(0, 4, 500))
    repeated = optimal_centroids(values.repeat_interleave(counts), 8)
    torch.testing.assert_close(optimal_centroids(values, 8, counts.double()), repeated)
    assert torch.equal(optimal_centroids(values, 8, torch.zeros(500)), optimal_centroids(values, 8))


@pytest.mark.filterwarnings("error")
def test_far_values_of_tiny_weight_count() -> None:
    """Their mass is lost beside the others in sums of float64; their cost is the largest of all."""
    inner = torch.from_numpy(np.random.default_rng(0).normal(size=3000))
    left, right = torch.tensor([[-1e13], [1e13]], dtype=torch.float64)
    weights = torch.ones(3002, dtype=torch.float64)
    weights[[0, -1]] = 1e-22
    centroids = optimal_centroids(torch.cat((left, inner, right)), 18, weights)
    expected = torch.cat((left, optimal_centroids(inner, 16), right))
    torch.testing.assert_close(centroids, expected)


def test_a_value_without_weight_does_not_count() -> None:
    values, weights = torch.tensor([1.0, 2.0, 50.0]), torch.tensor([1.0, 0.5, 0.0])
    assert optimal_centroids(values, 3, weights).tolist() == [1, 2, 2]


@pytest.mark.parametrize("weights", [None, torch.ones(4)])
def test_fewer_distinct_values_than_centroids(weights: Tensor | None) -> None:
    values = torch.tensor([2.0, -1.0, 2.0, -1.0])
    assert optimal_centroids(values, 4, weights).tolist() == [-1, 2, 2, 2]
    assert optimal_centroids(torch.full((4,), 0.1), 2, weights).unique().tolist() == [
        torch.tensor(0.1).item()
    ]


@pytest.mark.parametrize("exponent", [-1074, -149, 0, 1019])
def test_a_power_of_two_changes_nothing_else(exponent: int) -> None:
    """From denormal values to ones whose squares overflow."""
    scaled = np.ldexp([14.0, 1.0, 10.0, 3.0, 12.0], exponent)
    expected = np.ldexp([2.0, 12.0], exponent)
    assert optimal_centroids(torch.from_numpy(scaled), 2).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_and_order_gives_the_same(dtype: torch.dtype) -> None:
    """Tens of thousands of repeated float16 values: numpy would not sort them."""
    values = _draw("normal", 50000, np.random.default_rng(0)).to(dtype).requires_grad_()
    centroids = optimal_centroids(values, 16)
    assert centroids.dtype == torch.float64
    assert torch.equal(centroids, optimal_centroids(values.double().flip(0), 16))


def test_tables_are_the_optimal_centroids() -> None:
    generator = torch.Generator().manual_seed(1)
    values, weights = torch.randn(3000, generator=generator), torch.rand(3000, generator=generator)
    ks = (1, 2, 5, 16, 256, 5000)
    for counts in (None, weights):
        for k, found in zip(ks, optimal_tables(values, ks, counts), strict=True):
            assert torch.equal(found, optimal_centroids(values, k, counts))
