from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dkm_export.clustering.kmeans import (
    assign,
    inertia,
    initial_centroids,
    nearest,
    quick_centroids,
)


@given(st.integers(1, 300), st.integers(1, 4), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_assignment_is_optimal(n: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(2, n, dim, generator=generator)
    centroids = torch.randn(2, 16, dim, generator=generator)
    squared = torch.cdist(vectors.double(), centroids.double()).square()
    chosen = squared.gather(2, assign(vectors, centroids).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, squared.amin(-1), rtol=1e-5, atol=1e-5)
    found = inertia(vectors, centroids)
    torch.testing.assert_close(found, squared.amin(-1).sum(-1), rtol=1e-3, atol=1e-4)


def test_assignment_in_tiles_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, 1000, 2, generator=generator)
    centroids = torch.randn(1, 16, 2, generator=generator)
    whole = assign(vectors, centroids)
    monkeypatch.setattr("dkm_export.clustering.kmeans._TILE", 64)
    assert torch.equal(assign(vectors, centroids), whole)


def test_initial_centroids_find_separate_clusters_and_repeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.arange(16.0)[:, None] * torch.tensor([10.0, -10.0])
    vectors = (centers.repeat(20, 1) + torch.randn(320, 2, generator=generator) / 10)[None]
    for sample in (1 << 16, 200):
        monkeypatch.setattr("dkm_export.clustering.kmeans._SAMPLE", sample)
        centroids = initial_centroids(vectors, 16, seed=3)
        assert inertia(vectors, centroids).item() < 0.05 * 320
        assert torch.equal(centroids, initial_centroids(vectors, 16, seed=3))


@pytest.mark.parametrize("dim", [1, 2])
def test_sensitive_vectors_get_nearer_centroids(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, 2000, dim, generator=generator)
    sensitivity = torch.where(vectors[..., 0] > 0, 100.0, 1.0)
    upper = vectors[sensitivity > 1][None]
    plain = inertia(upper, initial_centroids(vectors, 8, seed=0))
    weighted = inertia(upper, initial_centroids(vectors, 8, 0, sensitivity))
    assert weighted < 0.7 * plain
    nothing = initial_centroids(vectors, 8, 0, torch.zeros_like(sensitivity))
    torch.testing.assert_close(nothing, initial_centroids(vectors, 8, seed=0))


@pytest.mark.parametrize("dim", [1, 2])
def test_fewer_distinct_values_than_centroids(dim: int) -> None:
    vectors = torch.tensor([1.0, 2.0, 2.0, 1.0])[None, :, None].expand(-1, -1, dim)
    centroids = initial_centroids(vectors, 8, seed=0)
    assert torch.isfinite(centroids).all()
    assert inertia(vectors, centroids).item() == 0


@pytest.mark.parametrize(
    "dim", [1, 2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_quick_centroids_are_almost_as_good(dim: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(dim)
    vectors = torch.randn(2, 20_000, dim, generator=generator)
    counts = torch.rand(2, 20_000, generator=generator) if weighted else None
    ks = (4, 16, 64)
    found = quick_centroids(vectors, ks, 0, counts)
    for k, quick in zip(ks, found, strict=True):
        best = initial_centroids(vectors, k, 0, counts)
        indices = [nearest(vectors, centroids) for centroids in (quick, best)]
        errors = [
            (vectors - torch.stack([c[i] for c, i in zip(centroids, which, strict=True)]))
            .square()
            .sum(-1)
            .mul(1 if counts is None else counts)
            .sum()
            for centroids, which in zip((quick, best), indices, strict=True)
        ]
        assert errors[0] <= 1.06 * errors[1]
    # whatever else is asked for
    if dim > 1:
        assert torch.equal(quick_centroids(vectors, (16,), 0, counts)[0], found[1])


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nearest_agrees_with_assign(dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    vectors = (torch.randn(3, 5000, dim, generator=generator) + 2).to(dtype)
    centroids = torch.randn(3, 32, dim, generator=generator).half().float() + 2
    centroids[:, 7] = centroids[:, 20]  # a tie
    one, other = nearest(vectors, centroids), assign(vectors.float(), centroids)
    groups = torch.arange(3)[:, None]
    distances = [
        (vectors.double() - centroids[groups, which].double()).square().sum(-1)
        for which in (one, other)
    ]
    assert torch.allclose(distances[0], distances[1], rtol=1e-5, atol=1e-6)
    differing = one != other
    assert differing.float().mean() < 0.2
    assert torch.equal(centroids[groups, one][~differing], centroids[groups, other][~differing])
    total = inertia(vectors, centroids)
    assert torch.allclose(total, distances[1].sum(1), rtol=1e-4)


@pytest.mark.parametrize("dim", [1, 4])
def test_of_equally_near_centroids_the_first_counts(dim: int) -> None:
    once = torch.randn(1, 40, dim, generator=torch.Generator().manual_seed(0))
    vectors = once.repeat(1, 9, 1)
    found = assign(vectors, once.repeat(1, 3, 1))  # each centroid stands there three times
    assert found.tolist() == [list(range(40)) * 9]
