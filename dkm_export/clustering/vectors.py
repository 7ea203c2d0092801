"""Attention between vectors and centroids in tiles: the n x k table never exists as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dkm_export.clustering.frame import Frame

_TILE = 1 << 19
"""Elements of a tile of the attention table: 2 MiB of float32, which a core's caches hold."""

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

    def __init__(self, vectors: Tensor, frame: Frame) -> None:
        n, self.dim = vectors.shape
        self.frame = frame
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        self.rows = vectors.new_empty(self.dim + 2, n, dtype=dtype)
        offsets = torch.sub(vectors.t(), frame.origin.to(dtype)[:, None], out=self.rows[: self.dim])
        offsets *= 1 / frame.unit
        self.rows[self.dim] = 1
        low, high = (end.item() for end in offsets.aminmax())
        self.farthest = max(-low, high)
        self.scale = frame.scale(self.farthest, dtype)
        self.shifted: Tensor | None = None
        self.single: tuple[Tensor, Tensor] | None = None
        self.centroids = self.values = frame.origin.new_empty(0)
        self.gradient = self.kept = self.shifts = self.rows.new_empty(0)

    def sums(self, centroids: Tensor) -> Tensor:
        ones = self.rows.new_ones(len(centroids))
        total = centroids.new_zeros(self.dim + 1, len(centroids))
        for tile, attention in self._tiles(centroids):
            mass = attention @ ones
            total += (tile[:-1] * mass.reciprocal()) @ attention
            tile[-1] += mass.log2()
        self.shifted = centroids
        return total.T

    def soften(self, centroids: Tensor, values: Tensor, out: Tensor) -> None:
        self.centroids, self.values = centroids, values
        columns = torch.cat(
            [(values * self.frame.unit + self.frame.origin).T, values.new_ones(1, len(values))]
        )
        columns = columns.to(self.rows.dtype)
        parts = out.split(self._size(len(centroids)), 1)
        for part, (_, attention) in zip(parts, self._tiles(centroids), strict=True):
            means = columns @ attention.t()
            part.copy_(means[:-1].mul_(means[-1].reciprocal_()))

    def pull_values(self, gradient: Tensor) -> Tensor:
        self.gradient = gradient.t().to(self.rows.dtype)
        total = self.centroids.new_zeros(self.dim, len(self.centroids))
        parts = self.gradient.split(self._size(len(self.centroids)), 1)
        # The shifts are those of this very attention, whose mass is therefore 1.
        for part, (_, attention) in zip(parts, self._tiles(self.centroids), strict=True):
            total += part @ attention
        return total.T

    def pull(
        self, centroids: Tensor, step: Tensor | None, *, output: bool, keep: bool, onward: bool
    ) -> Tensor:
        # The loss, as far as it depends on this attention, is linear in it:
        # sum_i left_i . (A right)_i, with what multiplies the sums and what multiplies the output.
        dim, dtype = self.dim, self.rows.dtype
        rights = [] if step is None else [step.T]
        rights += [self.values.T] if output else []
        rights.append(centroids.new_ones(1, len(centroids)))
        right = torch.cat(rights).to(dtype)
        ahead = 0 if step is None else dim + 1
        size = min(self._size(len(centroids)), self.rows.shape[1])
        lefts = self.rows.new_empty(len(right), size)
        product = self.rows.new_empty(size, len(centroids))
        back = (self.scale * centroids.T).to(dtype)
        total = centroids.new_zeros(dim + 1, len(centroids))
        if keep and not len(self.kept):
            self.kept = torch.zeros_like(self.rows[:dim])
        start = 0
        for tile, attention in self._tiles(centroids):
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
            if onward:
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
        if len(self.shifts):
            self.rows[-1] = self.shifts
        self.rows = self.gradient = self.shifts = self.rows.new_empty(0)
        self.single = None
        return tensors

    def attach(self, tensors: list[Tensor]) -> None:
        # A backward pass may change the shifts, as long as it restores them for another one.
        self.rows = tensors[0].data
        self.shifts, self.shifted = self.rows[-1].clone(), self.centroids

    def _size(self, k: int) -> int:
        """Vectors in a tile."""
        return max(1, (_TILE if self.rows.device.type == "cpu" else _TILE_GPU) // k)

    def _factor(self, centroids: Tensor) -> Tensor:
        """The right factor of the logits, ``[dim + 2, k]``, for which the shifts are made fit."""
        scale = self.scale * math.log2(math.e)
        bias = (centroids * centroids).sum(1, keepdim=True) * (-scale / 2)
        columns = [centroids * scale, bias, torch.full_like(bias, -1)]
        factor = torch.cat(columns, 1).to(self.rows.dtype).t()
        if self.shifted is centroids:
            return factor
        # for a single tile, the check takes longer than the work that it saves
        if self.shifted is not None and self.rows.shape[1] > self._size(len(centroids)):
            moved = (centroids - self.shifted).abs().sum(1).amax()
            turned = (centroids.square() - self.shifted.square()).sum(1).abs().amax() / 2
            if scale * (self.farthest * moved + turned) <= _DRIFT:
                return factor
        self._shift(factor)
        self.shifted = centroids
        return factor

    def _tiles(self, centroids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Tiles of ``rows`` and their attention ``[tile, k]``, not yet divided by its mass.

        The attention of one tile is overwritten by the next; that of a single tile is kept for
        another pass with the same centroids.
        """
        if self.single and self.single[0] is centroids:
            yield self.rows, self.single[1]
            return
        factor, size = self._factor(centroids), self._size(len(centroids))
        buffer = self.rows.new_empty(min(size, self.rows.shape[1]), len(centroids))
        for tile in self.rows.split(size, 1):
            yield tile, torch.mm(tile.t(), factor, out=buffer[: tile.shape[1]]).exp2_()
        self.single = (centroids, buffer) if self.rows.shape[1] <= size else None

    def _shift(self, factor: Tensor) -> None:
        """Make every row's shift its largest logit."""
        for tile in self.rows.split(self._size(factor.shape[1]), 1):
            torch.amax(factor[:-1].t() @ tile[:-1], 0, out=tile[-1])
