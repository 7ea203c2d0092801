"""Attention between scalars and centroids, of which everything is a function of one number.

So it is computed, in float64, for few values instead of for all weights; `spread` says how the
weights are spread over those.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dkm_export.clustering.frame import Frame
from dkm_export.clustering.spread import spread_over

_TILE = 1 << 16
"""Elements of a tile of the attention table: 512 KiB of float64, half of a core's L2."""

_TILE_GPU = 1 << 24
"""A GPU wants few large kernels: 128 MiB."""

_NEGLIGIBLE = 36.0
"""A centroid whose logit is this much below the largest has no weight in float64: e^-36 < 2^-51."""


class ScalarPoints:
    """Weights of dim 1; see `dkm_export.clustering.dkm.Points`.

    Values and centroids ascend, so that a tile of values attends to a few neighbouring centroids,
    its band; the others are left out, which at a low temperature are nearly all.
    """

    def __init__(self, vectors: Tensor, frame: Frame) -> None:
        self.frame = frame
        self.spread = spread_over(vectors.flatten(), frame.origin.item(), frame.unit)
        values = self.spread.values
        self.scale = frame.scale(values.abs().amax().item(), values.dtype)
        self.centroids = self.targets = values.new_empty(0)
        # per value: the soft weight, its derivative, the cotangent, and what the sums pass on
        self.soft = self.slope = self.gathered = self.influence = self.centroids
        self.gradient = vectors.new_empty(0)
        self.single: tuple[Tensor, Tensor, Tensor] | None = None

    def sums(self, centroids: Tensor) -> Tensor:
        c = centroids[:, 0]
        while True:
            x, mass = self.spread.values, self.spread.mass
            rows = torch.stack([mass * x, mass], 1)
            total = centroids.new_zeros(len(c), 2)
            if self.spread.exact:
                for where, band, attention in self._tiles(centroids):
                    total[band] += attention @ rows[where]
                return total
            features = torch.stack([c, c.square()])
            moments = x.new_empty(2, len(x))
            for where, band, attention in self._tiles(centroids):
                total[band] += attention @ rows[where]
                torch.mm(features[:, band], attention, out=moments[:, where])
            mean, square = moments
            deviation = (square - mean.square()).clamp_(min=0).sqrt_()
            if not self.spread.refine(mean, deviation, self.scale):
                return total

    def soften(self, centroids: Tensor, values: Tensor, out: Tensor) -> None:
        c, v = centroids[:, 0], values[:, 0]
        self.centroids, self.targets = centroids, v
        features = torch.stack([v, v * c, c])
        moments = c.new_empty(3, len(self.spread.values))
        for where, band, attention in self._tiles(centroids):
            torch.mm(features[:, band], attention, out=moments[:, where])
        self.soft, product, mean = moments
        self.slope = self.scale * (product - self.soft * mean)
        self.spread.look_up(self.soft * self.frame.unit + self.frame.origin, out[0])

    def pull_values(self, gradient: Tensor) -> Tensor:
        self.gradient = gradient[:, 0]
        self.gathered = self.spread.collect(self.gradient)
        self.influence = torch.zeros_like(self.gathered)
        total = self.gathered.new_zeros(len(self.centroids))
        for where, band, attention in self._tiles(self.centroids):
            total[band] += attention @ self.gathered[where]
        return total[:, None]

    def pull(
        self, centroids: Tensor, step: Tensor | None, *, output: bool, keep: bool, onward: bool
    ) -> Tensor:
        # With u_j, o_j = step, the loss depends on the logits l_ij of this attention as
        #   d loss / d l_ij = a_ij [m_i (x_i u_j + o_j - r_i) + g_i (v_j - f_i)]
        # where r_i and f_i are the attention's means of x_i u_j + o_j and of v_j. Multiplied out,
        # its sums over i (for the centroids) and over j (for the weights) are two products.
        x, mass, c = self.spread.values, self.spread.mass, centroids[:, 0]
        none = torch.zeros_like(c)
        u, o = (none, none) if step is None else step.T
        v, gathered = (self.targets, self.gathered) if output else (none, torch.zeros_like(x))
        soft = self.soft if output else gathered
        features = torch.stack([u, o, u * c, o * c, c])
        mx = mass * x
        rows = torch.stack([mx * x, mx, mass, mx, mass, gathered * x, gathered])
        total = c.new_zeros(len(c), 7)
        for where, band, attention in self._tiles(centroids):
            xs = x[where]
            mean_u, mean_o, mean_uc, mean_oc, mean_c = features[:, band] @ attention
            r = torch.addcmul(mean_o, xs, mean_u)
            if keep:
                through_logits = torch.addcmul(mean_oc, xs, mean_uc).addcmul_(r, mean_c, value=-1)
                self.influence[where] += mean_u.add_(through_logits, alpha=self.scale)
            if onward:
                taken = torch.mul(mass[where], r, out=rows[4, where])
                taken.addcmul_(gathered[where], soft[where])
                torch.mul(taken, xs, out=rows[3, where])
                total[band] += attention @ rows[:, where].T
        mxx, mx, m, rx, r, gx, g = total.T
        by_position = u * mxx + o * mx - rx + v * gx
        by_logit = u * mx + o * m - r + v * g
        pulled: Tensor = self.scale * (by_position - c * by_logit)
        return pulled[:, None]

    def weight_gradient(self, out: Tensor) -> None:
        self.spread.look_up(self.slope, out[0])
        out[0] *= self.gradient
        influence = torch.empty_like(out[0])
        self.spread.look_up(self.influence, influence)
        out[0] += influence

    def jacobian(self, centroids: Tensor, moved: Tensor) -> Tensor | None:
        x, mass, c, m = self.spread.values, self.spread.mass, centroids[:, 0], moved[:, 0]
        total = c.new_zeros(len(c), len(c))
        diagonal = total.diagonal()
        for where, band, attention in self._tiles(centroids):
            ahead = attention * (x[where] - m[band, None]) * mass[where]
            aside = x[where] - c[band, None]
            diagonal[band] += (ahead * aside).sum(1)
            total[band, band] -= ahead @ (attention * aside).T
        scaled: Tensor = self.scale * total
        return scaled

    def detach(self) -> list[Tensor]:
        self.gathered = self.influence = self.spread.values.new_empty(0)
        self.single = None
        self.gradient = self.gradient.new_empty(0)
        return self.spread.detach()

    def attach(self, tensors: list[Tensor]) -> None:
        self.spread.attach(tensors)

    def _tiles(self, centroids: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Tiles: which values, which centroids, and the attention ``[band, tile]``.

        That of a single tile is kept for another pass with the same centroids.
        """
        x, c = self.spread.values, centroids[:, 0]
        if self.single and self.single[0] is centroids and self.single[1] is x:
            yield slice(0, len(x)), slice(0, len(c)), self.single[2]
            return
        tile = _TILE if x.device.type == "cpu" else _TILE_GPU
        cuts = self._cut(max(1, tile // len(c)))
        bands = [(0, len(c))] * (len(cuts) - 1)
        if len(bands) > 1:
            bands = self._bands(c, cuts)
            average = sum(high - low for low, high in bands) / len(bands)
            if average < len(c) / 4:
                cuts = self._cut(max(1, int(tile / average / 2)))
                bands = self._bands(c, cuts)
        factor = torch.stack([c * self.scale, c.square() * (-self.scale / 2)], 1)
        ones = torch.stack([x, torch.ones_like(x)])
        for start, stop, (low, high) in zip(cuts[:-1], cuts[1:], bands, strict=True):
            attention = torch.softmax(factor[low:high] @ ones[:, start:stop], 0)
            yield slice(start, stop), slice(low, high), attention
        self.single = (centroids, x, attention) if len(bands) == 1 else None

    def _cut(self, size: int) -> list[int]:
        """Where tiles of about ``size`` values start, and where the last one ends."""
        cuts = [0]
        for end in self.spread.parts:
            length, start = end - cuts[-1], cuts[-1]
            pieces = -(-length // size)
            cuts += [start + length * i // pieces for i in range(1, pieces + 1)]
        return cuts

    def _bands(self, c: Tensor, cuts: list[int]) -> list[tuple[int, int]]:
        """The centroids that each tile of values attends to, as ranges.

        Differences of logits are linear in the value, so that the ends of a tile decide for it.
        """
        if (c[1:] < c[:-1]).any():  # one that nothing attends to has stayed behind
            return [(0, len(c))] * (len(cuts) - 1)
        x = self.spread.values
        bounds = torch.tensor(cuts, device=x.device)
        middles = (c[1:] + c[:-1]) / 2
        reaches = []
        for end in (x[bounds[:-1]], x[bounds[1:] - 1]):
            nearest = (end - c[torch.searchsorted(middles, end)]).square()
            reaches.append((end, (nearest + 2 * _NEGLIGIBLE / self.scale).sqrt()))
        (first, before), (last, after) = reaches
        low = torch.searchsorted(c, first - before)
        high = torch.searchsorted(c, last + after, right=True)
        return list(zip(low.tolist(), high.tolist(), strict=True))
