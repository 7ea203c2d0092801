"""Attention between vectors and centroids in tiles: the n x k table never exists as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_TILE = 1 << 18
"""Elements of a tile of the attention table: two tiles of float32 fit a core's 1 MiB of L2."""

_TILE_GPU = 1 << 24
"""A GPU wants few large kernels: 64 MiB."""

_DRIFT = 60.0
"""Most that a logit may have changed since its row's shift was computed; float32 ends at 126."""


class VectorPoints:
    """Weights of dim > 1; see `dkm_export.clustering.dkm.Points`.

    ``|w|^2`` cancels in a row's softmax, so that one product makes the logits, in base 2, whose
    exponential is the cheapest: ``log2(e) (2 w.c - |c|^2) / tau - shift``. ``rows`` holds the
    left factor, ``[dim + 2, n]``: the vectors, ones, and each row's shift, the logarithm of its
    attention mass at the centroids ``shifted`` (FlashAttention, arXiv 2205.14135, section 3.1,
    keeps the same number). While centroids move little, that is close enough for exponentials
    to neither overflow nor vanish, and saves a search for the row's maximum in every pass.
    """

    def __init__(self, vectors: Tensor, origin: Tensor, unit: float, tau: float) -> None:
        n, self.dim = vectors.shape
        self.origin, self.unit = origin, unit
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        self.rows = vectors.new_empty(self.dim + 2, n, dtype=dtype)
        offsets = torch.sub(vectors.t(), origin.to(dtype)[:, None], out=self.rows[: self.dim])
        offsets *= 1 / unit
        self.rows[self.dim] = 1
        low, high = (end.item() for end in offsets.aminmax())
        self.farthest = max(-low, high, 1e-100)
        # Logits are multiples of eps times the largest: beyond this, of more than 1.
        self.scale = min(2 / tau, 1 / (torch.finfo(dtype).eps * self.farthest**2))
        self.shifted: Tensor | None = None
        self.centroids = self.values = origin.new_empty(0)
        self.gradient = self.kept = self.rows.new_empty(0)

    def sums(self, centroids: Tensor) -> Tensor:
        factor = self._factor(centroids)
        ones = factor.new_ones(factor.shape[1])
        total = centroids.new_zeros(self.dim + 1, len(centroids))
        for tile, attention in self._tiles(factor):
            mass = attention @ ones
            total += (tile[:-1] * mass.reciprocal()) @ attention
            tile[-1] += mass.log2()
        self.shifted = centroids
        return total.T

    def soften(self, centroids: Tensor, values: Tensor, out: Tensor) -> None:
        self.centroids, self.values = centroids, values
        factor = self._factor(centroids)
        columns = torch.cat([(values * self.unit + self.origin).T, values.new_ones(1, len(values))])
        columns = columns.to(factor.dtype)
        parts = out.split(self._size(len(centroids)), 1)
        for part, (_, attention) in zip(parts, self._tiles(factor), strict=True):
            means = columns @ attention.t()
            part.copy_(means[:-1].mul_(means[-1].reciprocal_()))

    def pull_values(self, gradient: Tensor) -> Tensor:
        self.gradient = gradient.t().to(self.rows.dtype)
        total = self.centroids.new_zeros(self.dim, len(self.centroids))
        parts = self.gradient.split(self._size(len(self.centroids)), 1)
        # The shifts are those of this very attention, whose mass is therefore 1.
        tiles = self._tiles(self._factor(self.centroids))
        for part, (_, attention) in zip(parts, tiles, strict=True):
            total += part @ attention
        return total.T

    def pull(self, centroids: Tensor, step: Tensor | None, output: bool, keep: bool) -> Tensor:
        # The loss, as far as it depends on this attention, is linear in it:
        # sum_i left_i . (A right)_i, with what multiplies the sums and what multiplies the output.
        dim, factor = self.dim, self._factor(centroids)
        rights = [] if step is None else [step.T]
        rights += [self.values.T] if output else []
        rights.append(centroids.new_ones(1, len(centroids)))
        right = torch.cat(rights).to(factor.dtype)
        ahead = 0 if step is None else dim + 1
        size = self._size(len(centroids))
        lefts = factor.new_empty(len(right), size)
        product = factor.new_empty(size, len(centroids))
        back = (self.scale * centroids.T).to(factor.dtype)
        total = centroids.new_zeros(dim + 1, len(centroids))
        if keep and not len(self.kept):
            self.kept = torch.zeros_like(self.rows[:dim])
        start = 0
        for tile, attention in self._tiles(factor):
            stop = start + tile.shape[1]
            left, weighted = lefts[:, : stop - start], product[: stop - start]
            means = right @ attention.t()
            share = means[-1].reciprocal()
            means *= share
            if step is not None:
                torch.mul(tile[:-1], share, out=left[:ahead])
            if output:
                torch.mul(self.gradient[:, start:stop], share, out=left[ahead:-1])
            torch.sum(left[:-1] * means[:-1], 0, out=left[-1]).neg_()
            torch.mm(left.t(), right, out=weighted).mul_(attention)
            total += tile[:-1] @ weighted
            if keep:
                kept = self.kept[:, start:stop].addmm_(back, weighted.t())
                if step is not None:
                    kept += means[:dim]
            start = stop
        pulled: Tensor = self.scale * (total[:dim].T - centroids * total[dim, :, None])
        return pulled

    def weight_gradient(self, out: Tensor) -> None:
        out.copy_(self.kept)
        self.kept = self.kept.new_empty(0)

    def jacobian(self, centroids: Tensor, moved: Tensor) -> Tensor | None:
        return None

    def detach(self) -> list[Tensor]:
        tensors = [self.rows]
        self.rows = self.gradient = self.rows.new_empty(0)
        return tensors

    def attach(self, tensors: list[Tensor]) -> None:
        (self.rows,) = tensors

    def _size(self, k: int) -> int:
        """Vectors in a tile."""
        return max(1, (_TILE if self.rows.device.type == "cpu" else _TILE_GPU) // k)

    def _factor(self, centroids: Tensor) -> Tensor:
        """The right factor of the logits, ``[dim + 2, k]``, for which the shifts are made fit."""
        scale = self.scale * math.log2(math.e)
        bias = -scale / 2 * centroids.square().sum(1)
        factor = torch.cat([scale * centroids.T, bias[None], -torch.ones_like(bias)[None]])
        factor = factor.to(self.rows.dtype)
        if self.shifted is not None:
            moved = (centroids - self.shifted).abs().sum(1).amax()
            turned = (centroids.square() - self.shifted.square()).sum(1).abs().amax() / 2
            if scale * (self.farthest * moved + turned) <= _DRIFT:
                return factor
        self._shift(factor)
        self.shifted = centroids
        return factor

    def _tiles(self, factor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Tiles of ``rows`` and their attention ``[tile, k]``, not yet divided by its mass.

        The attention of one tile is overwritten by the next.
        """
        size = self._size(factor.shape[1])
        buffer = factor.new_empty(size, factor.shape[1])
        for tile in self.rows.split(size, 1):
            yield tile, torch.mm(tile.t(), factor, out=buffer[: tile.shape[1]]).exp2_()

    def _shift(self, factor: Tensor) -> None:
        """Make every row's shift its largest logit."""
        for tile in self.rows.split(self._size(factor.shape[1]), 1):
            torch.amax(factor[:-1].t() @ tile[:-1], 0, out=tile[-1])
