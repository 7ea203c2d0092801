"""The best k-means of scalars, by dynamic programming; nothing in it is random.

Sources: Wang and Song, "Ckmeans.1d.dp: Optimal k-means Clustering in One Dimension by Dynamic
Programming", R Journal 3(2), 2011; Grønlund et al., "Fast Exact k-Means, k-Medians and Bregman
Divergence Clustering in 1D", arXiv 1701.07204, section 2 (divide and conquer); Panter and Dite,
"Quantization Distortion in Pulse-Count Modulation with Nonuniform Spacing of Levels", Proc. IRE
39(1), 1951.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]

_TINY = np.finfo(np.float64).tiny
_MOST_POLISHING = 1000

_QUICK_CLUSTERS = 32
_QUICK_POSITIONS = 2048
"""Of the dynamic program when tables are only to be compared."""


def optimal_centroids(values: Tensor, k: int, weights: Tensor | None = None) -> Tensor:
    """The ``k`` centroids with the least weighted sum of squared distances.

    Optimal for up to `_most_positions` distinct values. With more, clusters begin at that many
    places only, and Lloyd's algorithm on all values follows. Values of weight 0 have no influence.
    With fewer distinct values than ``k``, each one is a centroid, and the last one is repeated.
    float64 does not resolve clusters narrower than a millionth of their distance from the middle
    value, or lighter than 1e-15 of all weights: between those, cuts can be worse than the best.

    Args:
        values: ``[n]``, n at least 1, floating point and finite.
        k: number of centroids, at least 1.
        weights: ``[n]``, finite and not negative, such as sensitivities. None, or all 0: uniform.

    Returns:
        float64 ``[k]``, ascending, on the device of ``values``.
    """
    return optimal_tables(values, (k,), weights)[0]


def optimal_tables(
    values: Tensor, ks: Sequence[int], weights: Tensor | None = None, *, quick: bool = False
) -> list[Tensor]:
    """`optimal_centroids` for each of several ``k``, out of one dynamic program.

    Clusters begin at as many places as the largest ``k`` has; ``quick``, at fewer, and many
    clusters where Panter and Dite's spacing puts them before Lloyd's algorithm.
    """
    points, mass, exponent = _points(values, weights)
    tables = {k: np.pad(points, (0, max(0, k - len(points))), mode="edge") for k in ks}
    wanted = [k for k in ks if k < len(points)]
    if wanted:
        # Sums run outward from the middle, where values are small and many: a tail of huge values
        # then takes no digits from any sum but its own.
        middle = len(points) // 2
        origin = points[middle]
        offsets = points - origin
        masses = _outward_sums(mass, middle)
        firsts = _outward_sums(mass * offsets, middle)
        few = [k for k in wanted if not quick or k <= _QUICK_CLUSTERS]
        cuts = {k: _spaced(points, mass, k) for k in wanted if k not in few}
        if few:
            seconds = _outward_sums(mass * offsets * offsets, middle)
            most = _QUICK_POSITIONS if quick else _most_positions(max(few))
            positions = _positions(points, mass, most)
            sums = np.stack([s[positions] for s in (masses, firsts, seconds)])
            begins = _best_begins(sums, max(few))
            cuts |= {k: positions[_cuts(begins, k, len(positions) - 1)] for k in few}
        for k in wanted:
            tables[k] = _polish(points, origin, masses, firsts, cuts[k])
    return [torch.from_numpy(np.ldexp(tables[k], exponent)).to(values.device) for k in ks]


def _most_positions(k: int) -> int:
    """About 0.1 s of dynamic programming, or more for many centroids, which need the places."""
    return max(4096, 2**17 // k, 4 * k)


def _points(values: Tensor, weights: Tensor | None) -> tuple[_Floats, _Floats, int]:
    """Distinct values ascending and their weights, both scaled to at most 1, and the exponent."""
    # float64 before anything is sorted: numpy cannot sort float16 on machines with AVX-512.
    x, exponent = _scaled(values)
    if weights is None or not weights.any():
        x = np.sort(x)
        mass = np.ones_like(x)
    else:
        mass, _ = _scaled(weights)
        x, mass = x[mass > 0], mass[mass > 0]
        order = np.argsort(x)
        x, mass = x[order], mass[order]
    first = np.flatnonzero(np.diff(x, prepend=-np.inf))
    return x[first], np.add.reduceat(mass, first), exponent


def _scaled(tensor: Tensor) -> tuple[_Floats, int]:
    """By a power of two, which is exact, so that no square or sum of them overflows."""
    array = tensor.detach().cpu().double().numpy()
    exponent = int(np.frexp(np.abs(array).max())[1])
    return np.ldexp(array, -exponent), exponent


def _outward_sums(terms: _Floats, middle: int) -> _Floats:
    """``s`` with ``s[j] - s[i] = terms[i:j].sum()``, of length n + 1, and 0 at ``middle``."""
    left = np.cumsum(terms[:middle][::-1])[::-1]
    return np.concatenate((-left, [0.0], np.cumsum(terms[middle:])))


def _positions(points: _Floats, mass: _Floats, most: int) -> _Ints:
    """Where clusters may begin and end: ascending, from 0 to n.

    Equal steps of the integral of density^(1/3), which is how the best centroids are spaced too
    (Panter and Dite). No gap counts for more than a step, or a few far values would use them up.
    """
    if len(points) <= most:
        return np.arange(len(points) + 1)
    lengths = _lengths(points, mass)
    step, wider = lengths.sum() / most, np.inf
    while step < 0.99 * wider:
        step, wider = np.minimum(lengths, step).sum() / most, step
    bins = np.floor(np.cumsum(np.minimum(lengths, step)) / step)
    apart = (np.diff(bins, prepend=0) > 0) | (lengths >= step)  # whole steps may round down
    return np.concatenate(([0], np.flatnonzero(apart) + 1, [len(points)]))


def _spaced(points: _Floats, mass: _Floats, k: int) -> _Ints:
    """The ``k + 1`` positions, first and last included, of clusters as Panter and Dite space them.

    For many clusters; some may be empty.
    """
    lengths = np.cumsum(_lengths(points, mass))
    inner = np.searchsorted(lengths, lengths[-1] * np.arange(1, k) / k) + 1
    return np.concatenate(([0], inner, [len(points)]))


def _lengths(points: _Floats, mass: _Floats) -> _Floats:
    """The integral of density^(1/3) from each point to the next."""
    density_times_gap = (mass[1:] + mass[:-1]) / 2
    lengths: _Floats = np.cbrt(density_times_gap) * np.square(np.cbrt(np.diff(points)))
    return lengths


def _best_begins(sums: _Floats, k: int) -> _Ints:
    """Where the last of the clusters that cost least begins, ``[k, positions or more]``.

    By the clusters to the left of it and by the position where it ends.

    The best begin of the last cluster never moves left as its end moves right. Ends therefore come
    in levels, each halving the distance, and look for their begin between those of neighbours.

    Args:
        sums: ``[3, positions]``, see `_outward_sums`, of mass, mass * value and mass * value².
        k: number of clusters, less than positions.
    """
    last = sums.shape[1] - 1
    least = _costs(sums, np.zeros(last + 1, np.int64), np.arange(last + 1))
    size = 1 << last.bit_length()
    begins = np.empty((k, size + 1), np.int64)
    for before in range(1, k):  # clusters to the left of the last one, none of them empty
        begin = begins[before]
        begin[: before + 1], begin[before + 1 :] = before, last
        costs = np.full(last + 1, np.inf)
        stride = size // 2
        while stride:
            ends = np.arange(stride, last + 1, 2 * stride)
            ends = ends[ends > before]
            low, high = begin[ends - stride], np.minimum(begin[ends + stride], ends - 1)
            counts = high - low + 1
            heads = np.cumsum(counts) - counts
            tried = np.arange(counts.sum()) + np.repeat(low - heads, counts)
            totals = least[tried] + _costs(sums, tried, np.repeat(ends, counts))
            costs[ends] = np.minimum.reduceat(totals, heads)
            hits = np.flatnonzero(totals == np.repeat(costs[ends], counts))
            begin[ends] = tried[hits[np.searchsorted(hits, heads)]]
            stride //= 2
        least = costs
    return begins


def _cuts(begins: _Ints, k: int, last: int) -> _Ints:
    """The ``k + 1`` positions, first and last included, between which the clusters cost least."""
    cuts = [last]
    for before in range(k - 1, 0, -1):
        cuts.append(int(begins[before, cuts[-1]]))
    return np.array([0, *reversed(cuts)])


def _costs(sums: _Floats, begins: _Ints, ends: _Ints) -> _Floats:
    """Weighted sum of squared distances to the mean, for each cluster."""
    mass, first, second = (s[ends] - s[begins] for s in sums)
    # A small mass can vanish beside the rest, and a small cost can round below 0.
    costs: _Floats = np.maximum(second - first * first / np.maximum(mass, _TINY), 0.0)
    return costs


def _polish(
    points: _Floats, origin: float, masses: _Floats, firsts: _Floats, cuts: _Ints
) -> _Floats:
    """Lloyd's algorithm from ``cuts``, without a pass over the points."""
    means: _Floats
    for _ in range(_MOST_POLISHING):
        means = origin + np.diff(firsts[cuts]) / np.maximum(np.diff(masses[cuts]), _TINY)
        # Rounding must not carry a mean out of its cluster. A cluster that became empty gets the
        # value to its left; the first cluster always holds the least value.
        means = np.maximum(means, points[np.minimum(cuts[:-1], len(points) - 1)])
        means = np.minimum(means, points[cuts[1:] - 1])
        inner = np.searchsorted(points, (means[1:] + means[:-1]) / 2, side="right")
        if np.array_equal(inner, cuts[1:-1]):
            break
        cuts = np.concatenate((cuts[:1], inner, cuts[-1:]))
    return means
