"""How the weights of a palette are spread over its centroids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dkm_export.palette import Palette

_BINS = 48
_MOST = 512


@dataclass(frozen=True)
class Centroid:
    """One entry of the LUT.

    Attributes:
        values: ``dim`` weights.
        count: indices that name it.
    """

    values: tuple[float, ...]
    count: int


@dataclass(frozen=True)
class Distribution:
    """The weights of one layer.

    Attributes:
        name: full parameter name.
        dim: weights that share an index.
        centroids: the most used ones of all groups: by value where ``dim`` is 1, else the most used
            first.
        total: how many centroids there are.
        used: how many of them at least one index names.
        edges: of the bins, ascending.
        bins: weights in each of them.
        entropy: information in an index, in bits: with all centroids used alike, it is ``bits``.
        bits: of an index.
    """

    name: str
    dim: int
    centroids: tuple[Centroid, ...]
    total: int
    used: int
    edges: tuple[float, ...]
    bins: tuple[int, ...]
    entropy: float
    bits: int


def used_centroids(palette: Palette) -> int:
    """How many entries of the LUT at least one index names."""
    return int(np.count_nonzero(_counts(palette)))


def distribution(name: str, palette: Palette) -> Distribution:
    """Count the weights of a palette."""
    dim, counts = palette.layout.dim, _counts(palette)
    flat, values = counts.reshape(-1), palette.lut.reshape(-1, dim).astype(np.float64)
    # the first of equal ones first, so that the same palette gives the same report
    chosen = np.argsort(-flat, kind="stable")[:_MOST]
    if dim == 1:
        chosen = chosen[np.argsort(values[chosen, 0], kind="stable")]
    bins, edges = np.histogram(palette.dense(), bins=_BINS)
    return Distribution(
        name=name,
        dim=dim,
        centroids=tuple(
            Centroid(tuple(map(float, values[i])), int(flat[i])) for i in chosen.tolist()
        ),
        total=len(flat),
        used=int(np.count_nonzero(flat)),
        edges=tuple(map(float, edges)),
        bins=tuple(map(int, bins)),
        entropy=_entropy(counts),
        bits=palette.bits,
    )


def _counts(palette: Palette) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """``[groups, 2**bits]``: indices that name each centroid."""
    groups, size = palette.layout.groups, 1 << palette.bits
    shift = np.arange(groups)[:, None] * size
    flat = (palette.indices.reshape(groups, -1) + shift).reshape(-1)
    return np.bincount(flat, minlength=groups * size).reshape(groups, size)


def _entropy(counts: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> float:
    """Mean over the groups, which have as many indices each."""
    shares = counts / counts.sum(1, keepdims=True)
    terms = np.where(shares > 0, shares * np.log2(np.where(shares > 0, shares, 1)), 0.0)
    return abs(float(-terms.sum(1).mean()))
