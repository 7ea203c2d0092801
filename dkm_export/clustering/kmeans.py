"""Hard k-means: where DKM starts, and the assignment it ends with."""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = 1 << 22
"""Most elements of a distance table that exist at once (16 MiB of float32)."""


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


def mean_squared_distance(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Mean over the vectors of the squared distance to the nearest centroid: ``[groups]``."""
    nearest = _gather(centroids, assign(vectors, centroids))
    return (vectors - nearest).square().sum(-1).mean(-1)


def initial_centroids(vectors: Tensor, k: int, seed: int, iterations: int = 25) -> Tensor:
    """k-means++ seeding, then Lloyd's algorithm.

    With fewer distinct vectors than ``k``, the surplus centroids repeat some of them.

    Args:
        vectors: ``[groups, n, dim]``.
        k: number of centroids.
        seed: makes the random choices repeatable.
        iterations: the most Lloyd iterations.

    Returns:
        ``[groups, k, dim]``, the dtype of ``vectors``.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_lloyd(group, k, generator, iterations) for group in vectors.detach()])


def _lloyd(vectors: Tensor, k: int, generator: torch.Generator, iterations: int) -> Tensor:
    centroids = _plus_plus(vectors, k, generator)
    previous: Tensor | None = None
    for _ in range(iterations):
        nearest = assign(vectors[None], centroids[None])[0]
        if previous is not None and torch.equal(nearest, previous):
            break
        previous = nearest
        counts = torch.bincount(nearest, minlength=k).unsqueeze(-1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, vectors)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids


def _plus_plus(vectors: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Each next centroid is a vector drawn with probability proportional to its distance²."""
    first = int(torch.randint(len(vectors), (1,), generator=generator))
    chosen = [vectors[first]]
    distance = (vectors - chosen[0]).square().sum(-1)
    for _ in range(k - 1):
        # multinomial takes at most 2**24 categories; a cumulative sum has no such limit.
        cumulative = distance.double().cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
        index = int(torch.searchsorted(cumulative, draw).clamp(max=len(vectors) - 1))
        chosen.append(vectors[index])
        distance = torch.minimum(distance, (vectors - vectors[index]).square().sum(-1))
    return torch.stack(chosen)


def _gather(centroids: Tensor, indices: Tensor) -> Tensor:
    """``centroids[g, indices[g, i]]`` as ``[groups, n, dim]``."""
    return torch.take_along_dim(centroids, indices.unsqueeze(-1), dim=1)
