"""How many scalar weights are spread over few values.

A function of the weights is computed at the values and looked up; a sum over the weights is
collected at the values first. 16-bit weights have at most 65,536 values, and few weights are their
own values: both are exact. Many float32 weights take a grid with linear interpolation, which is
accurate to the square of the grid's width, and cells in which that is not enough are left for the
weights in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW = 1 << 13
"""Up to this many weights are faster on their own than on a grid."""

_CELLS, _MOST_CELLS = 1 << 12, 1 << 18
"""Cells of the coarsest and of the finest grid."""

_RESOLUTION = 96.0
"""Cells per length over which attention changes, for a gradient error below 1e-4."""

_CHUNK = 1 << 17
"""Weights that are spread at once: 1 MiB of float64."""

_MARGIN = 2
"""Cells beside an unresolved one that count as unresolved too, for centroids that move."""


class Spread(Protocol):
    """Weights ``[n]`` over values ``[m]``.

    Attributes:
        values: float64 ``[m]``, ascending within each part.
        mass: float64 ``[m]``: how many weights each value stands for.
        parts: where each part of ``values`` ends.
        exact: whether the weights are nothing but these values, with nothing to `refine`.
    """

    values: Tensor
    mass: Tensor
    parts: list[int]
    exact: bool

    def collect(self, weights: Tensor) -> Tensor:
        """Sums at the values, float64 ``[m]``, of something per weight ``[n]``."""

    def look_up(self, table: Tensor, out: Tensor) -> None:
        """Write what a function that is ``table [m]`` at the values is at the weights: ``[n]``."""

    def refine(self, mean: Tensor, deviation: Tensor, scale: float) -> bool:
        """Change the values where attention changes too fast for them; False when all is well.

        Args:
            mean: the attention's mean of the centroids at each value, which ascends.
            deviation: their standard deviation; the mean's derivative is ``scale deviation^2``.
            scale: ``2 / tau``.
        """

    def detach(self) -> list[Tensor]:
        """Hand over all tensors of the weights' size."""

    def attach(self, tensors: list[Tensor]) -> None:
        """Take them back."""


def spread_over(weights: Tensor, origin: float, unit: float) -> Spread:
    """The fastest spread that is accurate.

    Args:
        weights: ``[n]`` floating point.
        origin: what values are counted from.
        unit: what they are counted in.
    """
    if weights.dtype in (torch.float16, torch.bfloat16):
        return _Codes(weights, origin, unit)
    if weights.dtype == torch.float64 or len(weights) <= _FEW:
        return _Each(weights, origin, unit)
    low, high = (end.item() for end in weights.aminmax())
    # a narrower range has no room for a grid in float32
    return (
        _Grid(weights, origin, unit, low, high)
        if high - low > 1e-30
        else _Each(weights, origin, unit)
    )


class _Each:
    """Every weight is a value."""

    exact = True

    def __init__(self, weights: Tensor, origin: float, unit: float) -> None:
        self.values, self.order = ((weights.double() - origin) / unit).sort()
        self.mass = torch.ones_like(self.values)
        self.parts = [len(weights)]

    def collect(self, weights: Tensor) -> Tensor:
        return weights.double()[self.order]

    def look_up(self, table: Tensor, out: Tensor) -> None:
        out[self.order] = table.to(out.dtype)

    def refine(self, mean: Tensor, deviation: Tensor, scale: float) -> bool:
        return False

    def detach(self) -> list[Tensor]:
        tensors = [self.order]
        self.order = self.order.new_empty(0)
        return tensors

    def attach(self, tensors: list[Tensor]) -> None:
        (self.order,) = tensors


class _Codes:
    """The 16-bit codes that occur are the values."""

    exact = True

    def __init__(self, weights: Tensor, origin: float, unit: float) -> None:
        codes = weights.view(torch.int16).to(torch.int32) & 0xFFFF
        counts = torch.bincount(codes, minlength=1 << 16)
        present = counts.nonzero().flatten()
        values = present.to(torch.int16).view(weights.dtype).double()
        self.values, order = ((values - origin) / unit).sort()
        present = present[order]
        self.mass = counts[present].double()
        self.parts = [len(present)]
        position = torch.zeros_like(counts, dtype=torch.int32)
        position[present] = torch.arange(len(present), dtype=torch.int32, device=weights.device)
        self.index = position.index_select(0, codes)

    def collect(self, weights: Tensor) -> Tensor:
        return torch.bincount(self.index, weights.double(), minlength=len(self.values))

    def look_up(self, table: Tensor, out: Tensor) -> None:
        out.copy_(table.float().index_select(0, self.index))

    def refine(self, mean: Tensor, deviation: Tensor, scale: float) -> bool:
        return False

    def detach(self) -> list[Tensor]:
        tensors = [self.index]
        self.index = self.index.new_empty(0)
        return tensors

    def attach(self, tensors: list[Tensor]) -> None:
        (self.index,) = tensors


class _Grid:
    """Nodes of an even grid are values, and every weight in a cell that is too coarse.

    Weights are gone through in chunks that stay in the cache, which is faster than whole passes.

    Attributes:
        cell: int32 ``[n]``, each weight's cell; ``cells``, one more than there are, for `alone`.
        place: ``[n]``, where in its cell it is, 0 to 1.
        alone: int64, weights that are values of their own.
        apart: bool ``[cells + 1]``, the cells that those are from.
        kept: int64, the nodes that are values: those with weights nearby.
        occupied: bool ``[cells]``, cells between two of them.
    """

    exact = False
    cell: Tensor
    place: Tensor
    alone: Tensor
    apart: Tensor
    kept: Tensor
    occupied: Tensor

    def __init__(
        self, weights: Tensor, origin: float, unit: float, low: float, high: float
    ) -> None:
        self.weights, self.low, self.high = weights, low, high
        self.origin, self.unit = origin, unit
        # Until the first attention is known, all nodes of a coarse grid, and no weights.
        self.cells = _CELLS
        self.values = self._nodes()
        self.mass = torch.ones_like(self.values)
        self.parts = [len(self.values)]
        self.built = False

    def collect(self, weights: Tensor) -> Tensor:
        sums = self._sums(weights)
        return torch.cat([sums[self.kept], weights[self.alone].double()])

    def look_up(self, table: Tensor, out: Tensor) -> None:
        nodes = table.new_zeros(self.cells + 1)
        nodes[self.kept] = table[: self.parts[0]]
        # value and difference to the next one in one gather, as real and imaginary part
        pairs = torch.complex(nodes.float(), F.pad(nodes.diff(), (0, 1)).float())
        for part, cell, place in self._chunks(out, self.cell, self.place):
            found = torch.view_as_real(pairs.index_select(0, cell))
            part.copy_(torch.addcmul(found[:, 0], found[:, 1], place))
        if len(self.alone):
            out[self.alone] = table[self.parts[0] :].to(out.dtype)

    def refine(self, mean: Tensor, deviation: Tensor, scale: float) -> bool:
        nodes = mean.new_zeros(2, self.cells + 1)
        kept = self.kept if self.built else slice(None)
        nodes[:, kept] = torch.stack([mean, deviation])[:, : self.parts[0]]
        # The mean ascends, so that its rise bounds the deviation anywhere within a cell.
        rise = nodes[0].diff() / 2
        steepest = torch.maximum(torch.maximum(nodes[1, 1:], nodes[1, :-1]), rise)
        width = (self.high - self.low) / self.unit / self.cells
        need = steepest * (2 * _RESOLUTION * scale * width)
        if self.built:
            need *= self.occupied
        worst = need.amax().item()
        if self.built and worst <= 1:
            return False
        most = min(_MOST_CELLS, len(self.weights) // 4)
        if self.built and self.cells >= most:
            coarse = (need[None] > 1).float()
            self.apart[:-1] |= F.max_pool1d(coarse, 2 * _MARGIN + 1, 1, _MARGIN)[0] > 0
        else:
            # a little more, for centroids that move
            self.cells = max(_CELLS, math.ceil(min(1.1 * worst * self.cells, most)))
            self.apart = torch.zeros(self.cells + 1, dtype=torch.bool, device=need.device)
        self._build()
        return True

    def detach(self) -> list[Tensor]:
        tensors = [self.cell, self.place, self.alone]
        self.weights = self.cell = self.place = self.alone = self.values.new_empty(0)
        return tensors

    def attach(self, tensors: list[Tensor]) -> None:
        self.cell, self.place, self.alone = tensors

    def _nodes(self) -> Tensor:
        steps = torch.arange(self.cells + 1, dtype=torch.float64, device=self.weights.device)
        nodes = steps * ((self.high - self.low) / self.cells) + (self.low - self.origin)
        return nodes / self.unit

    def _build(self) -> None:
        """Place every weight."""
        self.built = True
        self.cell = torch.empty_like(self.weights, dtype=torch.int32)
        self.place = torch.empty_like(self.weights)
        per_width = self.cells / (self.high - self.low)
        for weights, cell, place in self._chunks(self.weights, self.cell, self.place):
            position = weights.double().sub_(self.low).mul_(per_width)
            cell.copy_(position).clamp_(max=self.cells - 1)
            place.copy_(position.sub_(cell))
        self.alone = self.cell.new_empty(0, dtype=torch.int64)
        single = self.values.new_empty(0)
        if self.apart.any():
            alone = self.apart.index_select(0, self.cell).nonzero().flatten()
            single, order = ((self.weights[alone].double() - self.origin) / self.unit).sort()
            self.alone = alone[order]
            self.cell[alone] = self.cells
            self.place[alone] = 0
        mass = self._sums(None)
        # nodes without weights nearby are left out
        self.kept = mass.nonzero().flatten()
        self.occupied = (mass[:-1] > 0) & (mass[1:] > 0)
        self.values = torch.cat([self._nodes()[self.kept], single])
        self.mass = torch.cat([mass[self.kept], torch.ones_like(single)])
        self.parts = [len(self.kept), len(self.values)]

    def _sums(self, weights: Tensor | None) -> Tensor:
        """Sums at all nodes of ``weights``, or how many there are."""
        whole, ahead = self.values.new_zeros(2, self.cells + 1)
        tensors = (self.cell, self.place) if weights is None else (self.cell, self.place, weights)
        for cell, place, *rest in self._chunks(*tensors):
            part = rest[0].double() if rest else torch.ones_like(place, dtype=torch.float64)
            whole += torch.bincount(cell, part, self.cells + 1)
            ahead += torch.bincount(cell, part * place, self.cells + 1)
        # what is ahead of a node belongs to the next one
        nodes: Tensor = whole - ahead
        nodes[-1] = 0
        nodes[1:] += ahead[:-1]
        return nodes

    def _chunks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        size = len(tensors[0])
        if tensors[0].device.type == "cpu":
            size = max(_CHUNK, 2 * self.cells)  # each chunk costs a pass over the cells
        return zip(*(tensor.split(size) for tensor in tensors), strict=True)
