"""Hard k-means: where DKM starts, and the assignment it ends with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dkm_export.clustering.optimal import optimal_tables

_TILE = 1 << 18
"""Most elements of a distance table that exist at once: 1 MiB of float32, which L2 holds."""

_SAMPLE = 1 << 16
"""Vectors that k-means begins with where there are more."""

_LAST_ITERATIONS = 3
"""Iterations over all vectors, after those over a sample."""

_QUICK_SAMPLE = 1 << 14
"""The same for centroids that are only to be compared, with no iteration over all vectors."""


def assign(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid of each vector; of equally near ones the lowest index.

    Args:
        vectors: ``[groups, n, dim]`` floating point.
        centroids: ``[groups, k, dim]``.

    Returns:
        int64 ``[groups, n]``.
    """
    groups, k, _ = centroids.shape
    tiles = vectors.split(max(1, _TILE // (groups * k)), dim=1)
    # Differences instead of products: a product's rounding could prefer the second nearest.
    exact = "donot_use_mm_for_euclid_dist"
    distances = (torch.cdist(x, centroids, compute_mode=exact) for x in tiles)
    return torch.cat([tile.min(-1).indices for tile in distances], 1)


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid of each vector, many times faster than `assign`.

    Where two are equally near but for rounding, it is either of them.

    Args:
        vectors: ``[groups, n, dim]`` floating point.
        centroids: ``[groups, k, dim]``.

    Returns:
        int64 ``[groups, n]``.
    """
    return torch.stack([_nearest(x, c) for x, c in zip(vectors, centroids, strict=True)])


def inertia(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Sum over the vectors of the squared distance to the nearest centroid: float64 ``[groups]``.

    Args:
        vectors: ``[groups, n, dim]`` floating point.
        centroids: ``[groups, k, dim]``.
    """
    return torch.stack([_inertia(x, c) for x, c in zip(vectors, centroids, strict=True)])


def initial_centroids(
    vectors: Tensor, k: int, seed: int, sensitivity: Tensor | None = None
) -> Tensor:
    """Centroids to start from: optimal ones for scalars, k-means++ and Lloyd's for vectors.

    With fewer distinct vectors than ``k``, the surplus centroids repeat some of them.

    Args:
        vectors: ``[groups, n, dim]`` floating point.
        k: number of centroids.
        seed: makes the random choices for vectors repeatable; scalars need none.
        sensitivity: ``[groups, n]``, how much each vector's squared distance counts, at least 0.

    Returns:
        ``[groups, k, dim]``, at least float32.
    """
    if vectors.shape[-1] == 1:
        return _scalars(vectors, (k,), sensitivity, quick=False)[0]
    vectors, weights = _widened(vectors, sensitivity)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [
            _lloyd(x, k, s, generator, _SAMPLE, _LAST_ITERATIONS)
            for x, s in zip(vectors, weights, strict=True)
        ]
    )


def quick_centroids(
    vectors: Tensor, ks: Sequence[int], seed: int, sensitivity: Tensor | None = None
) -> list[Tensor]:
    """`initial_centroids` for each of several ``k``, to compare them: less work, a little worse.

    Scalars share one small dynamic program; of vectors only a sample is clustered.
    """
    if vectors.shape[-1] == 1:
        return _scalars(vectors, ks, sensitivity, quick=True)
    vectors, weights = _widened(vectors, sensitivity)
    pairs = list(zip(vectors, weights, strict=True))
    found = []
    for k in ks:
        generator = torch.Generator().manual_seed(seed)  # whatever the other ks are
        found.append(torch.stack([_lloyd(x, k, s, generator, _QUICK_SAMPLE, 0) for x, s in pairs]))
    return found


def _scalars(
    vectors: Tensor, ks: Sequence[int], sensitivity: Tensor | None, *, quick: bool
) -> list[Tensor]:
    """By ``k``: ``[groups, k, 1]``."""
    vectors, weights = _widened(vectors, sensitivity)
    pairs = zip(vectors, weights, strict=True)
    tables = [optimal_tables(x[:, 0], ks, s, quick=quick) for x, s in pairs]
    return [torch.stack(best)[..., None].to(vectors.dtype) for best in zip(*tables, strict=True)]


def _widened(
    vectors: Tensor, sensitivity: Tensor | None
) -> tuple[Tensor, Sequence[Tensor] | Sequence[None]]:
    """Vectors of at least float32, and sensitivities by group."""
    vectors = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    return vectors, [None] * len(vectors) if sensitivity is None else [*sensitivity]


def _lloyd(
    vectors: Tensor,
    k: int,
    sensitivity: Tensor | None,
    generator: torch.Generator,
    most: int,
    last_iterations: int,
) -> Tensor:
    """On a sample of at most ``most`` vectors, and a few iterations on all."""
    weights = torch.ones_like(vectors[:, 0]) if sensitivity is None else sensitivity
    if not weights.any():
        weights = torch.ones_like(weights)
    weights = weights.to(vectors.dtype)
    sample, chosen = vectors, weights
    if len(vectors) > most:
        order = torch.randperm(len(vectors), generator=generator)[:most].to(vectors.device)
        sample, chosen = vectors[order], weights[order]
    centroids = _plus_plus(sample, k, chosen, generator)
    centroids = _iterate(sample, centroids, chosen, iterations=25)
    if sample is vectors:
        return centroids
    return _iterate(vectors, centroids, weights, last_iterations)


def _iterate(vectors: Tensor, centroids: Tensor, weights: Tensor, iterations: int) -> Tensor:
    """Lloyd's algorithm; a centroid that is nearest to no vector stays where it is."""
    previous: Tensor | None = None
    weighted = vectors * weights.unsqueeze(-1)
    for _ in range(iterations):
        indices = torch.cat([s.max(-1).indices for s, _ in _scores(vectors, centroids)])
        if previous is not None and torch.equal(indices, previous):
            break
        previous = indices
        mass = torch.bincount(indices, weights, len(centroids)).unsqueeze(-1)
        sums = torch.zeros_like(centroids).index_add_(0, indices, weighted)
        centroids = torch.where(mass > 0, sums / mass, centroids)
    return centroids


def _plus_plus(vectors: Tensor, k: int, weights: Tensor, generator: torch.Generator) -> Tensor:
    """Each next centroid is a vector drawn with probability proportional to its distance²."""
    chosen: list[Tensor] = []
    distance = torch.ones_like(weights)
    for _ in range(k):
        # multinomial takes at most 2**24 categories; a cumulative sum has no such limit.
        cumulative = (distance * weights).double().cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64).to(vectors.device)
        index = torch.searchsorted(cumulative, draw * cumulative[-1], right=True)
        chosen.append(vectors[index.clamp(max=len(vectors) - 1)[0]])
        step = (vectors - chosen[-1]).square().sum(-1)
        distance = step if len(chosen) == 1 else torch.minimum(distance, step)
    return torch.stack(chosen)


def _nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    if vectors.shape[-1] == 1:
        ascending, order = centroids[:, 0].double().sort()
        middles = (ascending[1:] + ascending[:-1]) / 2
        return order[torch.bucketize(vectors[:, 0].double(), middles)]
    scores = _scores(vectors.to(centroids.dtype), centroids)
    return torch.cat([tile.max(-1).indices for tile, _ in scores])


def _inertia(vectors: Tensor, centroids: Tensor) -> Tensor:
    if vectors.shape[-1] == 1:
        indices = _nearest(vectors, centroids)
        return (vectors[:, 0].double() - centroids[indices, 0].double()).square().sum()
    distances = [
        (tile.square().sum(-1) - 2 * scores.amax(-1)).clamp_(min=0).sum(dtype=torch.float64)
        for scores, tile in _scores(vectors.to(centroids.dtype), centroids)
    ]
    return torch.stack(distances).sum()


def _scores(vectors: Tensor, centroids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """In tiles, ``w.c - |c|^2 / 2``, which is largest for the nearest centroid, and the vectors.

    Products are faster than distances; around their mean the vectors round least. The indices of
    ``max`` are argmax's, which takes half as long again.
    """
    origin = centroids.mean(0)
    centered = centroids - origin
    bias = -centered.square().sum(-1) / 2
    for tile in vectors.split(max(1, _TILE // len(centroids))):
        offsets = tile - origin
        yield torch.addmm(bias, offsets, centered.T), offsets
