from __future__ import annotations

import pytest
import torch
from hypothesis import assume, currently_in_test_context, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dkm_export.clustering import (
    Clusters,
    Gradient,
    assign,
    dkm,
    inertia,
    initial_centroids,
    soft_cluster,
    spread,
)
from dkm_export.clustering.frame import Frame


def _paper(w: Tensor, c: Tensor, tau: float, iterations: int) -> tuple[Tensor, Tensor]:
    """The paper's algorithm for one group, written down as it is described; `dkm.py` cites it."""
    for _ in range(iterations):
        distances = (w[:, None] - c[None]).square().sum(-1)
        a = torch.softmax(-distances / tau, dim=1)
        mass = a.sum(0)
        # ours leaves a centroid where it is that no weight attends to, as far as float64 knows
        if currently_in_test_context():
            assume(mass.min() > 1e-15)
        c = (a.T @ w) / mass[:, None]
    return a @ c, c


def _reference(
    w: Tensor, start: Tensor, tau: Tensor, iterations: int, cotangent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft weights, centroids and the gradient of all groups, by autograd in float64."""
    weights = w.detach().double().requires_grad_()
    results = [
        _paper(x, c.double(), float(t), iterations)
        for x, c, t in zip(weights, start, tau, strict=True)
    ]
    soft = torch.stack([vectors for vectors, _ in results])
    (soft * cotangent.double()).sum().backward()
    assert weights.grad is not None
    return soft.detach(), torch.stack([c.detach() for _, c in results]), weights.grad


def _ours(
    w: Tensor,
    start: Tensor,
    tau: Tensor,
    iterations: int,
    cotangent: Tensor,
    gradient: Gradient = "unrolled",
    many: bool = True,
) -> tuple[Clusters, Tensor]:
    """The same of `soft_cluster`; ``many`` takes the way of many weights for few ones too."""
    weights = w.detach().clone().requires_grad_()
    reduce = (lambda sums: sums) if many else None
    clusters = soft_cluster(weights, start, tau, iterations, gradient=gradient, reduce=reduce)
    clusters.vectors.backward(cotangent)
    assert weights.grad is not None
    return clusters, weights.grad


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


def _problem(
    groups: int, n: int, dim: int, k: int, seed: int, softness: float, heavy: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Float64 weights, centroids near the best ones, temperatures, and a cotangent."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(groups, n, dim, generator=generator, dtype=torch.float64)
    if heavy:
        w = w * w.square()
    start = initial_centroids(w, k, seed)
    if dim == 1:
        start = start.sort(1).values
    start = start + 0.05 * start.std() * torch.randn(start.shape, generator=generator).double()
    tau = softness * (inertia(w, start) / n + 1e-3 * w.square().mean((1, 2)))[:, None, None]
    cotangent = torch.randn(groups, n, dim, generator=generator, dtype=torch.float64)
    return 0.02 * w, 0.02 * start, 0.02**2 * tau, cotangent


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 2),
    st.integers(8, 300),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([2, 4, 16]),
    st.integers(0, 10**6),
    st.floats(0.05, 4),
    st.integers(1, 5),
    st.booleans(),
)
def test_value_and_gradient_are_the_papers(
    groups: int, n: int, dim: int, k: int, seed: int, softness: float, iterations: int, many: bool
) -> None:
    w, start, tau, cotangent = _problem(groups, n, dim, k, seed, softness)
    soft, centroids, gradient = _reference(w, start, tau, iterations, cotangent)
    ours, ours_gradient = _ours(w, start, tau, iterations, cotangent, many=many)
    assert _error(ours.vectors, soft) < 1e-11
    found = ours.centroids if dim > 1 else ours.centroids.gather(1, start.argsort(1).argsort(1))
    assert _error(found, centroids) < 1e-11
    assert _error(ours_gradient, gradient) < 1e-10


@settings(deadline=None, max_examples=25)
@given(
    st.integers(33_000, 70_000),
    st.sampled_from([2, 4, 16, 64]),
    st.integers(0, 10**6),
    st.floats(0.03, 8),
    st.integers(1, 4),
    st.booleans(),
)
def test_scalars_on_a_grid(
    n: int, k: int, seed: int, softness: float, iterations: int, heavy: bool
) -> None:
    """float32, also where the temperature is too low for the grid, or outliers stretch it."""
    w, start, tau, cotangent = (x.float() for x in _problem(1, n, 1, k, seed, softness, heavy))
    soft, _, gradient = _reference(w, start, tau, iterations, cotangent)
    ours, ours_gradient = _ours(w, start, tau, iterations, cotangent)
    assert _error(ours.vectors, soft) < 1e-4
    # A lone weight between two far centroids can make the gradient depend on the last digits of
    # where they are: what nearly equal centroids would change is no error.
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
    _, _, nearby = _reference(w, start * (1 + 1e-6 * noise), tau, iterations, cotangent)
    assert _error(ours_gradient, gradient) < max(1e-4, 10 * _error(nearby, gradient))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(10, 50_000),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.sampled_from([2, 16, 64]),
    st.integers(0, 10**6),
    st.floats(0.03, 8),
    st.integers(1, 4),
)
def test_scalars_of_16_bits(
    n: int, dtype: torch.dtype, k: int, seed: int, softness: float, iterations: int
) -> None:
    """Exact, seen before the result is rounded to 16 bits."""
    assume(n >= k)  # with fewer weights than centroids there is no palette
    w, start, tau, cotangent = _problem(1, n, 1, k, seed, softness)
    w, start = w.to(dtype), start.sort(1).values
    soft, _, gradient = _reference(w, start, tau, iterations, cotangent)
    found = w.new_empty(2, 1, n, dtype=torch.float32)
    frame = Frame(start.new_zeros(1), 2.0**-5, float(tau) * 2**10)
    group = dkm._ManyWeights(
        w[0], frame, start[0] * 2**5, iterations, 0.0, "unrolled", lambda sums: sums
    )
    group.soften(found[0])
    group.weight_gradient(cotangent[0].float(), found[1])
    assert _error(found[0, 0, :, None], soft[0]) < 1e-6
    assert _error(found[1, 0, :, None], gradient[0]) < 1e-6
    ours, _ = _ours(w, start, tau, iterations, cotangent.to(dtype))
    assert ours.vectors.dtype == dtype
    assert torch.equal(ours.vectors[0, :, 0], found[0, 0].to(dtype))


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("dim", "k"), [(1, 16), (1, 256), (4, 16), (4, 256)])
def test_float32_is_close_to_float64(dim: int, k: int, offset: float, many: bool) -> None:
    """Also for small layers at 8 bits, whose temperature is tiny."""
    generator = torch.Generator().manual_seed(0)
    w = 0.05 * torch.randn(1, 4096, dim, generator=generator) + offset
    start = initial_centroids(w, k, seed=0)
    tau = 0.05 * inertia(w, start)[:, None, None] / 4096
    cotangent = torch.randn(1, 4096, dim, generator=generator)
    soft, _, gradient = _reference(w, start, tau, 3, cotangent)
    ours, ours_gradient = _ours(w, start, tau, 3, cotangent, many=many)
    assert _error(ours.vectors - offset, soft - offset) < 1e-4
    # float32 weights around 1 have only 6e-8 of room, which a tiny temperature magnifies
    assert _error(ours_gradient, gradient) < (1e-3 if offset == 0 else 0.02)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
def test_gradcheck(dim: int, gradient: Gradient) -> None:
    """At a fixed point, where the implicit gradient is that of the function too."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 3, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(1, 9, dim, generator=generator, dtype=torch.float64)
    w = (start.repeat(1, 3, 1) + 0.2 * noise).requires_grad_()
    tau = torch.full((1, 1, 1), 0.2, dtype=torch.float64)

    def soft(weights: Tensor) -> Tensor:
        return soft_cluster(weights, start, tau, 60, gradient=gradient).vectors

    torch.testing.assert_close(
        soft_cluster(w, start, tau, 60).centroids, soft_cluster(w, start, tau, 90).centroids
    )
    # BLAS may round differently from call to call, which a solver passes on
    assert torch.autograd.gradcheck(soft, w, nondet_tol=1e-9)


@pytest.mark.parametrize(
    ("dim", "k", "softness", "iterations"),
    [(1, 4, 0.5, 100), (1, 8, 1.0, 150), (2, 8, 0.2, 150), (4, 8, 0.5, 250)],
)
def test_implicit_is_a_long_unrolled_run(
    dim: int, k: int, softness: float, iterations: int
) -> None:
    """Where that many iterations converge, which is slow in general."""
    w, start, tau, cotangent = _problem(1, 100, dim, k, 1, softness)
    _, unrolled = _ours(w, start, tau, iterations, cotangent, "unrolled")
    _, implicit = _ours(w, start, tau, iterations, cotangent, "implicit")
    _, free = _ours(w, start, tau, iterations, cotangent, "jacobian-free")
    assert _error(implicit, unrolled) < 1e-7
    assert _error(free, unrolled) > 0.05


def test_jacobian_free_is_the_gradient_of_the_last_iteration() -> None:
    w, start, tau, cotangent = _problem(1, 300, 2, 8, 0, 1.0)
    _, fixed = _paper(w[0], start[0], float(tau), 5000)
    weights = w[0].clone().requires_grad_()
    soft, last = _paper(weights, fixed, float(tau), 1)
    # IDKM-JFB: dC/dW is that of one iteration, into the values as well as into the attention
    into = fixed.clone().requires_grad_()
    attention = torch.softmax(-(w[0][:, None] - into[None]).square().sum(-1) / float(tau), 1)
    through = torch.autograd.grad((attention @ fixed * cotangent[0]).sum(), into)[0]
    ((soft * cotangent[0]).sum() + (last * through).sum()).backward()
    assert weights.grad is not None
    _, free = _ours(w, fixed[None], tau, 1, cotangent, "jacobian-free")
    assert _error(free[0], weights.grad) < 1e-8


@pytest.mark.parametrize(("n", "dim"), [(2000, 4), (120_000, 1), (2000, 1)])
def test_parts_of_the_weights_add_up(n: int, dim: int) -> None:
    """What processes that hold parts do, one after the other: every sum is replayed by recorder."""
    w, start, tau, cotangent = (x.float() for x in _problem(1, n, dim, 16, 0, 0.3))
    expected, gradient = _ours(w, start, tau, 3, cotangent)
    parts = w.split(n // 3, 1)
    cotangents = cotangent.split(n // 3, 1)
    known: list[Tensor] = []

    def run(index: int, totals: list[Tensor]) -> tuple[Clusters, Tensor, list[Tensor]]:
        own: list[Tensor] = []

        def reduce(sums: Tensor) -> Tensor:
            own.append(sums)
            return totals[len(own) - 1] if len(own) <= len(totals) else sums

        weights = parts[index].clone().requires_grad_()
        clusters = soft_cluster(weights, start, tau, 3, reduce=reduce)
        clusters.vectors.backward(cotangents[index])
        assert weights.grad is not None
        return clusters, weights.grad, own

    # Each round makes one more total known.
    for place in range(3 + 1 + 2):
        shares = [run(index, known)[2][place] for index in range(len(parts))]
        known.append(torch.stack(shares).sum(0))
    results = [run(index, known) for index in range(len(parts))]
    for clusters, _, _ in results:
        assert _error(clusters.centroids, expected.centroids.double()) < 1e-5
    soft = torch.cat([clusters.vectors for clusters, _, _ in results], 1)
    assert _error(soft, expected.vectors.detach().double()) < 1e-5
    assert _error(torch.cat([x for _, x, _ in results], 1), gradient.double()) < 1e-4


@pytest.mark.parametrize("dim", [1, 4])
def test_tiles_change_nothing(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, start, tau, cotangent = _problem(1, 3000, dim, 16, 0, 0.2)
    whole, gradient = _ours(w, start, tau, 3, cotangent)
    for module in ("vectors", "scalars"):
        monkeypatch.setattr(f"dkm_export.clustering.{module}._TILE", 1000)
    tiled, tiled_gradient = _ours(w, start, tau, 3, cotangent)
    assert _error(tiled.vectors, whole.vectors.detach()) < 1e-12
    assert _error(tiled_gradient, gradient) < 1e-11


def test_a_grid_is_left_where_it_is_too_coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the weights taken one by one, the gradient is far off: the check is needed."""
    w, start, tau, cotangent = (x.float() for x in _problem(1, 40_000, 1, 16, 0, 0.03))
    _, _, gradient = _reference(w, start, tau, 3, cotangent)
    assert _error(_ours(w, start, tau, 3, cotangent)[1], gradient) < 1e-4
    monkeypatch.setattr(spread, "_RESOLUTION", 1e-3)
    assert _error(_ours(w, start, tau, 3, cotangent)[1], gradient) > 0.1


def test_a_low_temperature_is_hard_k_means() -> None:
    for dim, tau in ((2, 1e-6), (1, 1e-6), (2, 1e-300), (1, 1e-300)):
        vectors = torch.randn(1, 500, dim, generator=torch.Generator().manual_seed(0))
        centroids = initial_centroids(vectors, 8, seed=0)
        soft = soft_cluster(vectors, centroids, torch.full((1, 1, 1), tau, dtype=torch.float64), 1)
        nearest = assign(vectors, centroids.sort(1).values if dim == 1 else centroids)
        expected = soft.centroids[0, nearest[0]]
        close = (soft.vectors[0] - expected).abs().amax(1) < 1e-4
        assert close.float().mean() > 0.99


def test_converged_clusters_stop_early() -> None:
    vectors = torch.tensor([[[0.0], [1.0]]])
    tau = torch.full((1, 1, 1), 1e-3)
    result = soft_cluster(vectors, vectors.clone(), tau, iterations=10**9, eps=1e-6)
    torch.testing.assert_close(result.centroids, vectors)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dim", [1, 2])
def test_an_empty_cluster_stays_where_it_is(dim: int, many: bool) -> None:
    vectors = torch.tensor([[[0.0] * dim, [0.1] * dim]])
    start = torch.tensor([[[0.05] * dim, [1000.0] * dim]])
    tau = torch.full((1, 1, 1), 1e-2)
    result, gradient = _ours(vectors, start, tau, 3, torch.ones_like(vectors), many=many)
    assert result.centroids[0, 1, 0].item() == 1000
    torch.testing.assert_close(gradient.sum(), torch.tensor(2.0 * dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 4])
@pytest.mark.parametrize(
    ("n", "many"), [(1, False), (1, True), (3, False), (3, True), (200, False), (40_000, True)]
)
def test_odd_weights(n: int, many: bool, dim: int, dtype: torch.dtype) -> None:
    """Constant, nearly constant, of few values, tiny, with one huge outlier."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, n, dim, generator=generator)
    one_far = noise.clone()
    one_far[0, 0] = 3e4
    tiny = 1e-15 if dtype != torch.float16 else 1e-6
    for w in (0 * noise + 0.5, 0 * noise, noise.sign(), tiny * noise, one_far):
        weights = w.to(dtype)
        start = initial_centroids(weights, 16, seed=0)
        floor = 1e-6 * weights.detach().double().square().mean() + 1e-300
        tau = torch.maximum(0.3 * inertia(weights.detach(), start) / n, floor)[:, None, None]
        clusters, gradient = _ours(weights, start, tau, 3, noise.to(dtype), many=many)
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(clusters.centroids).all()
        distance = (clusters.vectors - weights).detach().double().square().sum()
        assert distance <= 4 * n * tau.sum() + 1e-4 * weights.detach().double().square().sum()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dim", [1, 4])
def test_extreme_magnitudes(dim: int, scale: float) -> None:
    w, start, tau, cotangent = _problem(1, 20_000, dim, 16, 0, 0.3)
    _, gradient = _ours(w.float(), start.float(), tau, 3, cotangent.float())
    far, far_gradient = _ours(
        (w * scale).float(), (start * scale).float(), tau * scale**2, 3, cotangent.float()
    )
    assert torch.isfinite(far.vectors).all()
    assert _error(far_gradient, gradient.double()) < 1e-3


@pytest.mark.parametrize("dim", [1, 4])
def test_autocast_changes_nothing(dim: int) -> None:
    w, start, tau, cotangent = (x.float() for x in _problem(1, 2000, dim, 16, 0, 0.3))
    plain, gradient = _ours(w, start, tau, 3, cotangent)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            cast, cast_gradient = _ours(w, start, tau, 3, cotangent)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(cast.vectors, plain.vectors)
    assert torch.equal(cast_gradient, gradient)
