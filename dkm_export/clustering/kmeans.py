"""Hard k-means: where DKM starts, and the assignment it ends with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dkm_export.clustering.optimal import optimal_centroids

_TILE = 1 << 22
"""Most elements of a distance table that exist at once (16 MiB of float32)."""

_SAMPLE = 1 << 16
"""Vectors that k-means begins with where there are more."""

_LAST_ITERATIONS = 3
"""Iterations over all vectors, after those over a sample."""


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
    return torch.cat([torch.cdist(x, centroids, compute_mode=exact).argmin(-1) for x in tiles], 1)


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
    vectors = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    weights = [None] * len(vectors) if sensitivity is None else [*sensitivity]
    if vectors.shape[-1] == 1:
        best = [optimal_centroids(x[:, 0], k, s) for x, s in zip(vectors, weights, strict=True)]
        return torch.stack(best).unsqueeze(-1).to(vectors.dtype)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_lloyd(x, k, s, generator) for x, s in zip(vectors, weights, strict=True)])


def _lloyd(
    vectors: Tensor, k: int, sensitivity: Tensor | None, generator: torch.Generator
) -> Tensor:
    weights = torch.ones_like(vectors[:, 0]) if sensitivity is None else sensitivity
    if not weights.any():
        weights = torch.ones_like(weights)
    weights = weights.to(vectors.dtype)
    sample, chosen = vectors, weights
    if len(vectors) > _SAMPLE:
        order = torch.randperm(len(vectors), generator=generator)[:_SAMPLE].to(vectors.device)
        sample, chosen = vectors[order], weights[order]
    centroids = _plus_plus(sample, k, chosen, generator)
    centroids = _iterate(sample, centroids, chosen, iterations=25)
    if sample is vectors:
        return centroids
    return _iterate(vectors, centroids, weights, _LAST_ITERATIONS)


def _iterate(vectors: Tensor, centroids: Tensor, weights: Tensor, iterations: int) -> Tensor:
    """Lloyd's algorithm; a centroid that is nearest to no vector stays where it is."""
    previous: Tensor | None = None
    weighted = vectors * weights.unsqueeze(-1)
    for _ in range(iterations):
        nearest = torch.cat([scores.argmax(-1) for scores, _ in _scores(vectors, centroids)])
        if previous is not None and torch.equal(nearest, previous):
            break
        previous = nearest
        mass = torch.bincount(nearest, weights, len(centroids)).unsqueeze(-1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, weighted)
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


def _inertia(vectors: Tensor, centroids: Tensor) -> Tensor:
    if vectors.shape[-1] == 1:
        ascending = centroids[:, 0].double().sort().values
        x = vectors[:, 0].double()
        nearest = ascending[torch.bucketize(x, (ascending[1:] + ascending[:-1]) / 2)]
        return (x - nearest).square().sum()
    distances = [
        (tile.square().sum(-1) - 2 * scores.amax(-1)).clamp_(min=0).sum(dtype=torch.float64)
        for scores, tile in _scores(vectors.to(centroids.dtype), centroids)
    ]
    return torch.stack(distances).sum()


def _scores(vectors: Tensor, centroids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """In tiles, ``w.c - |c|^2 / 2``, which is largest for the nearest centroid, and the vectors.

    Products are faster than distances; around their mean the vectors round least.
    """
    origin = centroids.mean(0)
    centered = centroids - origin
    bias = -centered.square().sum(-1) / 2
    for tile in vectors.split(max(1, _TILE // len(centroids))):
        offsets = tile - origin
        yield torch.addmm(bias, offsets, centered.T), offsets
