"""DKM of few weights, in plain operators with torch's own gradient.

They are done before the passes of `Points` are set up, and their attention table is small enough to
keep while the backward pass runs, which computes it once more so that nothing is kept until then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dkm_export.clustering.frame import UNATTENDED, Frame

_ENTRIES = {True: 1 << 18, False: 1 << 15}
"""Most entries of the attention table of scalars and of vectors for which this is faster."""

_ITERATIONS = 8
"""Most iterations: the backward pass keeps some tables of each, at most 4 MiB in size."""


class FewWeights:
    """The weights of one group.

    Attributes:
        moved: float64 ``[k, dim]``, the centroids after the last iteration.
    """

    def __init__(
        self, vectors: Tensor, frame: Frame, start: Tensor, iterations: int, limit: float
    ) -> None:
        """Run the iterations.

        Args:
            vectors: ``[n, dim]`` floating point.
            frame: of all other arguments.
            start: float64 ``[k, dim]``.
            iterations: at most.
            limit: movement of centroids that ends them.
        """
        self.vectors, self.frame = vectors, frame
        self.start, self.iterations, self.limit = start, iterations, limit
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        self.dtype = torch.float64 if vectors.shape[1] == 1 else dtype
        columns = self._columns()
        self.scale = frame.scale(columns.abs().amax().item(), self.dtype)
        self.soft, moved = self._cluster(columns)
        self.moved = moved.double()

    @staticmethod
    def fit(n: int, dim: int, k: int, iterations: int) -> bool:
        """Whether this is the fastest way for ``n`` weights of ``k`` centroids."""
        return n * k <= _ENTRIES[dim == 1] and iterations <= _ITERATIONS

    def soften(self, out: Tensor) -> None:
        """Write the soft weights to ``out [dim, n]``."""
        out.copy_(self.soft.double() * self.frame.unit + self.frame.origin[:, None])

    def weight_gradient(self, cotangent: Tensor, out: Tensor) -> None:
        """Write the gradient with respect to the weights to ``out [dim, n]``."""
        with torch.enable_grad():
            columns = self._columns().requires_grad_()
            soft, _ = self._cluster(columns)
            (gradient,) = torch.autograd.grad(soft, columns, cotangent.t().to(self.dtype))
        out.copy_(gradient)

    def detach(self) -> list[Tensor]:
        """Hand over all large tensors, for autograd to keep."""
        tensors = [self.vectors]
        self.vectors = self.soft = self.vectors.new_empty(0)
        return tensors

    def attach(self, tensors: list[Tensor]) -> None:
        """Take them back."""
        (self.vectors,) = tensors

    def _columns(self) -> Tensor:
        origin = self.frame.origin.to(self.dtype)[:, None]
        return (self.vectors.detach().t().to(self.dtype) - origin) * (1 / self.frame.unit)

    def _cluster(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Soft columns ``[dim, n]`` and the last centroids ``[k, dim]``."""
        centroids = self.start.to(self.dtype)
        for _ in range(self.iterations):
            bias = centroids.square().sum(1, keepdim=True) * (-self.scale / 2)
            attention = torch.softmax(torch.addmm(bias, centroids, columns, alpha=self.scale), 0)
            mass = attention.sum(1, keepdim=True)
            previous, centroids = centroids, attention @ columns.t() / mass
            if mass.detach().amin() <= UNATTENDED:
                attended = mass > UNATTENDED
                moved = attention @ columns.t() / torch.where(attended, mass, 1.0)
                centroids = torch.where(attended, moved, previous)
            if self.limit and (centroids - previous).detach().abs().amax() <= self.limit:
                break
        return centroids.t() @ attention, centroids.detach()
