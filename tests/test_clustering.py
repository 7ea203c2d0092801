from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dkm_export.clustering import assign, initial_centroids, mean_squared_distance, soft_cluster


def _paper(w: Tensor, c: Tensor, tau: float, iterations: int) -> Tensor:
    """The paper's algorithm for one group, written down as it is described."""
    for _ in range(iterations):
        a = torch.softmax(-torch.cdist(w, c).square() / tau, dim=1)
        c = (a.T @ w) / a.sum(0)[:, None]
    return torch.softmax(-torch.cdist(w, c).square() / tau, dim=1) @ c


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 2),
    st.integers(8, 40),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 10**6),
    st.floats(0.05, 2),
    st.integers(1, 4),
)
def test_value_and_gradient_are_the_papers(
    groups: int, n: int, dim: int, seed: int, tau: float, iterations: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(groups, n, dim, generator=generator, dtype=torch.float64)
    start = torch.randn(groups, 4, dim, generator=generator, dtype=torch.float64)
    cotangent = torch.randn(groups, n, dim, generator=generator, dtype=torch.float64)
    taus = torch.full((groups, 1, 1), tau, dtype=torch.float64)
    ours, reference = (vectors.clone().requires_grad_() for _ in range(2))
    soft = soft_cluster(ours, start, taus, iterations).vectors
    expected = torch.stack(
        [_paper(w, c, tau, iterations) for w, c in zip(reference, start, strict=True)]
    )
    torch.testing.assert_close(soft, expected)
    (soft * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    torch.testing.assert_close(ours.grad, reference.grad)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("dim", "k"), [(1, 16), (1, 256), (4, 16), (4, 256)])
def test_float32_is_close_to_float64(dim: int, k: int, offset: float) -> None:
    """Also for small layers at 8 bits, whose temperature is tiny."""
    generator = torch.Generator().manual_seed(0)
    vectors = 0.05 * torch.randn(1, 4096, dim, generator=generator) + offset
    cotangent = torch.randn(1, 4096, dim, generator=generator)
    start = initial_centroids(vectors, k, seed=0)
    tau = 0.05 * mean_squared_distance(vectors, start)[:, None, None]
    results = []
    for dtype in (torch.float32, torch.float64):
        weights = vectors.to(dtype, copy=True).requires_grad_()
        soft = soft_cluster(weights, start.to(dtype), tau.to(dtype), 3).vectors
        (soft * cotangent).sum().backward()
        assert weights.grad is not None
        results.append((soft.detach().double(), weights.grad.double()))
    (soft, gradient), (exact_soft, exact_gradient) = results
    error = (soft - exact_soft).norm() / (exact_soft - offset).norm()
    assert error < 1e-4
    # float32 weights around 1 have only 6e-8 of room, which a tiny temperature magnifies
    error = (gradient - exact_gradient).norm() / exact_gradient.norm()
    assert error < (0.005 if offset == 0 else 0.1)


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 7, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    start = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    tau = torch.full((2, 1, 1), 0.7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w: soft_cluster(w, start, tau, 3).vectors, vectors)


def test_a_low_temperature_is_hard_k_means() -> None:
    vectors = torch.randn(1, 500, 2, generator=torch.Generator().manual_seed(0))
    centroids = initial_centroids(vectors, 8, seed=0)
    soft = soft_cluster(vectors, centroids, torch.full((1, 1, 1), 1e-6), 1)
    nearest = assign(vectors, soft.centroids)
    torch.testing.assert_close(soft.vectors[0], soft.centroids[0, nearest[0]])


def test_converged_clusters_stop_early() -> None:
    vectors = torch.tensor([[[0.0], [1.0]]])
    tau = torch.full((1, 1, 1), 1e-3)
    result = soft_cluster(vectors, vectors.clone(), tau, iterations=10**9, eps=1e-6)
    torch.testing.assert_close(result.centroids, vectors)


def test_an_empty_cluster_stays_where_it_is() -> None:
    vectors = torch.tensor([[[0.0], [0.1]]], requires_grad=True)
    start = torch.tensor([[[0.05], [1000.0]]])
    result = soft_cluster(vectors, start, torch.full((1, 1, 1), 1e-2), 3)
    assert result.centroids[0, 1].item() == 1000
    result.vectors.sum().backward()
    assert vectors.grad is not None
    assert torch.isfinite(vectors.grad).all()


@given(st.integers(1, 300), st.integers(1, 4), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_assignment_is_optimal(n: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(2, n, dim, generator=generator)
    centroids = torch.randn(2, 16, dim, generator=generator)
    squared = torch.cdist(vectors.double(), centroids.double()).square()
    chosen = squared.gather(2, assign(vectors, centroids).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, squared.amin(-1), rtol=1e-5, atol=1e-5)


def test_assignment_in_tiles_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, 1000, 2, generator=generator)
    centroids = torch.randn(1, 16, 2, generator=generator)
    whole = assign(vectors, centroids)
    monkeypatch.setattr("dkm_export.clustering.kmeans._TILE", 64)
    assert torch.equal(assign(vectors, centroids), whole)


def test_initial_centroids_find_separate_clusters_and_repeat() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.arange(16.0)[:, None] * torch.tensor([10.0, -10.0])
    vectors = (centers.repeat(20, 1) + torch.randn(320, 2, generator=generator) / 10)[None]
    centroids = initial_centroids(vectors, 16, seed=3)
    assert mean_squared_distance(vectors, centroids).item() < 0.05
    assert torch.equal(centroids, initial_centroids(vectors, 16, seed=3))


def test_fewer_distinct_values_than_centroids() -> None:
    vectors = torch.tensor([1.0, 2.0, 2.0, 1.0])[None, :, None]
    centroids = initial_centroids(vectors, 8, seed=0)
    assert torch.isfinite(centroids).all()
    assert mean_squared_distance(vectors, centroids).item() == 0
