"""Differentiable k-means in its plain form: attention between weights and centroids.

Source: Cho et al., "DKM: Differentiable K-Means Clustering Layer for Neural Network
Compression", ICLR 2022, arXiv 2108.12659, section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Clusters(NamedTuple):
    """Result of `soft_cluster`.

    Attributes:
        vectors: ``[groups, n, dim]``, each vector replaced by its attention-weighted centroids.
        centroids: ``[groups, k, dim]`` after the last iteration.
    """

    vectors: Tensor
    centroids: Tensor


def attention(vectors: Tensor, centroids: Tensor, tau: Tensor) -> Tensor:
    """Row-softmax of ``-|w - c|^2 / tau``: ``[groups, n, k]``, rows sum to 1.

    For vectors, ``|w|^2`` is the same along a row and cancels, so that one product does. With
    scalars there can be many centroids close together, for which the product's rounding is too
    coarse.

    Args:
        vectors: ``[groups, n, dim]``.
        centroids: ``[groups, k, dim]``.
        tau: temperature per group, ``[groups, 1, 1]``, in squared units of the weights.
    """
    if vectors.shape[-1] == 1:
        return torch.softmax((vectors - centroids.transpose(1, 2)).square() / -tau, dim=-1)
    # Products of values around zero round least, and distances do not change with the origin.
    origin = centroids.mean(1, keepdim=True).detach()
    vectors, centroids = vectors - origin, centroids - origin
    half_norms = centroids.square().sum(-1).unsqueeze(1) / 2
    products = torch.baddbmm(-half_norms, vectors, centroids.transpose(1, 2))
    return torch.softmax(products * (2 / tau), dim=-1)


def soft_cluster(
    vectors: Tensor, centroids: Tensor, tau: Tensor, iterations: int, eps: float = 0.0
) -> Clusters:
    """Run DKM: attention, new centroids, until they move by at most ``eps``, and once to soften.

    Gradients run through all iterations. A centroid that no vector attends to stays where it is.

    Args:
        vectors: ``[groups, n, dim]``, the weights.
        centroids: ``[groups, k, dim]``, where the last step ended; no gradient flows into them.
        tau: ``[groups, 1, 1]``, see `attention`.
        iterations: the most iterations to run, at least 1.
        eps: largest movement of any centroid that counts as converged.
    """
    centroids = centroids.detach()
    for _ in range(iterations):
        weights = attention(vectors, centroids, tau)
        mass = weights.sum(1).unsqueeze(-1)
        attended = mass > torch.finfo(mass.dtype).tiny
        means = weights.transpose(1, 2) @ vectors / torch.where(attended, mass, 1.0)
        moved = torch.where(attended, means, centroids)
        step = (moved.detach() - centroids.detach()).abs().max()
        centroids = moved
        if step <= eps:
            break
    return Clusters(attention(vectors, centroids, tau) @ centroids, centroids)
