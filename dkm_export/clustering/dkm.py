"""Differentiable k-means: the iterations, and their gradient in three forms.

Source: Cho et al., "DKM: Differentiable K-Means Clustering Layer for Neural Network
Compression", ICLR 2022, arXiv 2108.12659, section 3. With ``A(C)`` the row-softmax of
``-|w_i - c_j|^2 / tau`` over the centroids:

    C_{t+1} = (A(C_t)^T W) / (A(C_t)^T 1)      for t = 0 .. T-1
    W~      = A(C_{T-1}) C_T

Everything that depends on all weights is a sum over them of ``k`` short rows, so this file needs
only those sums: `Points` makes them, tile by tile for vectors and on few values for scalars, and
``reduce`` adds up those of other processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dkm_export.clustering.few import FewWeights
from dkm_export.clustering.frame import UNATTENDED, Frame, full_precision
from dkm_export.clustering.scalars import ScalarPoints
from dkm_export.clustering.vectors import VectorPoints

Gradient = Literal["unrolled", "implicit", "jacobian-free"]
"""``unrolled``: through all iterations, the paper's. ``implicit``: at the fixed point (IDKM, arXiv
2312.07759), for iterations that have converged. ``jacobian-free``: the last iteration's part of
it, IDKM-JFB."""

Reduce = Callable[[Tensor], Tensor]
"""Adds up a small tensor over all processes that hold a part of the weights."""


class Clusters(NamedTuple):
    """Result of `soft_cluster`.

    Attributes:
        vectors: ``[groups, n, dim]``, each vector replaced by its attention-weighted centroids.
        centroids: ``[groups, k, dim]`` after the last iteration, scalars in ascending order; no
            gradient flows through them.
    """

    vectors: Tensor
    centroids: Tensor


class Points(Protocol):
    """The weights of one group, and every sum over them that DKM needs.

    Centroids are float64 ``[k, dim]``, sums float64, both in a `Frame`.
    """

    def __init__(self, vectors: Tensor, frame: Frame) -> None:
        """Take the weights, ``[n, dim]``."""

    def sums(self, centroids: Tensor) -> Tensor:
        """``[k, dim + 1]``: ``sum_i a_ij w_i`` and ``sum_i a_ij``."""

    def soften(self, centroids: Tensor, values: Tensor, out: Tensor) -> None:
        """Write ``sum_j a_ij values_j``, as weights, to ``out [dim, n]``.

        The last `sums` must have been of the same centroids.
        """

    def pull_values(self, gradient: Tensor) -> Tensor:
        """Gradient ``[k, dim]`` with respect to the values of `soften`, from that of its result."""

    def pull(
        self, centroids: Tensor, step: Tensor | None, *, output: bool, keep: bool, onward: bool
    ) -> Tensor:
        """Gradient ``[k, dim]`` with respect to ``centroids``, through their attention.

        Args:
            centroids: what the attention was computed with.
            step: ``[k, dim + 1]``, the gradient with respect to `sums`, or None.
            output: whether to add the path through the attention of `soften`.
            keep: whether to keep what flows to the weights for `weight_gradient`.
            onward: whether the result is wanted; it is 0 otherwise.
        """

    def weight_gradient(self, out: Tensor) -> None:
        """Write the gradient with respect to the weights, all that was kept, to ``[dim, n]``."""

    def jacobian(self, centroids: Tensor, moved: Tensor) -> Tensor | None:
        """``mass_j d moved_j / d centroids_l`` as ``[k, k]`` for scalars; None for vectors."""

    def detach(self) -> list[Tensor]:
        """Hand over all large tensors, for autograd to keep."""

    def attach(self, tensors: list[Tensor]) -> None:
        """Take them back."""


def soft_cluster(
    vectors: Tensor,
    centroids: Tensor,
    tau: Tensor,
    iterations: int,
    eps: float = 0.0,
    gradient: Gradient = "unrolled",
    reduce: Reduce | None = None,
) -> Clusters:
    """Run DKM until the centroids move by at most ``eps``, and soften the weights.

    Memory does not depend on ``iterations``, but for a few MB while the gradient of few weights is
    computed. Works the same under autocast; float16 and bfloat16
    weights are clustered in float32 or wider.

    Args:
        vectors: ``[groups, n, dim]`` floating point, the weights (of this process).
        centroids: ``[groups, k, dim]``, where the last step ended; no gradient flows into them.
        tau: ``[groups, 1, 1]``, temperature in squared units of the weights, above 0. Below what
            the weights' precision can tell apart, assignments are hard anyway.
        iterations: the most iterations to run, at least 1.
        eps: largest movement of any centroid that counts as converged, relative to the standard
            deviation of the group's centroids.
        gradient: see `Gradient`.
        reduce: see `Reduce`; all processes call it equally often, with equal shapes. None when
            this process has all weights.
    """
    options = (iterations, eps, gradient, reduce)
    soft, moved = _SoftCluster.apply(vectors, centroids, tau, options)  # type: ignore[no-untyped-call]
    return Clusters(soft, moved)


class _SoftCluster(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        vectors: Tensor,
        centroids: Tensor,
        tau: Tensor,
        options: tuple[int, float, Gradient, Reduce | None],
    ) -> tuple[Tensor, Tensor]:
        iterations, eps, gradient, reduce = options
        count, n, dim = vectors.shape
        few = reduce is None and gradient == "unrolled"
        few = few and FewWeights.fit(n, dim, centroids.shape[1], iterations)
        soft = vectors.new_empty(count, dim, n)
        moved = torch.empty_like(centroids)
        ctx.groups, kept = [], []
        with full_precision(vectors.device):
            for index, temperature in enumerate(tau.flatten().tolist()):
                start = centroids[index].double()
                if dim == 1:
                    start = start.sort(0).values
                # the median, which no far centroid takes away from where most weights are
                origin, unit = start.median(0).values, _unit(start)
                start = (start - origin) / unit
                limit = eps * start.std(correction=0).item()
                frame = Frame(origin, unit, temperature / unit**2)
                group: FewWeights | _ManyWeights
                if few:
                    group = FewWeights(vectors[index], frame, start, iterations, limit)
                else:
                    group = _ManyWeights(
                        vectors[index], frame, start, iterations, limit, gradient, reduce or _alone
                    )
                group.soften(soft[index])
                moved[index] = group.moved * unit + origin
                tensors = group.detach()
                ctx.groups.append((group, len(tensors)))
                kept += tensors
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(moved)
        return soft.transpose(1, 2), moved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        count, n, dim = cotangent.shape
        result = cotangent.new_empty(count, dim, n)
        kept = list(ctx.saved_tensors)
        with full_precision(cotangent.device):
            for index, (group, size) in enumerate(ctx.groups):
                group.attach(kept[:size])
                del kept[:size]
                group.weight_gradient(cotangent[index], result[index])
                group.detach()
        return result.transpose(1, 2), None, None, None


def _alone(sums: Tensor) -> Tensor:
    return sums


def _unit(centroids: Tensor) -> float:
    """A power of two about as large as the centroids' standard deviation."""
    deviation = centroids.std(correction=0).item()
    return 2.0 ** max(-100, min(100, round(math.log2(deviation)))) if deviation else 1.0


class _ManyWeights:
    """The weights of one group, in passes that keep nothing of their attention.

    Attributes:
        points: the weights.
        path: centroids ``C_0 .. C_T``.
        masses: float64 ``[k, 1]`` of each iteration: the attention that each centroid got;
            infinite, which takes it out of every quotient, for one that got none and stayed.
        all_moved: of each iteration, whether none stayed.
    """

    def __init__(
        self,
        vectors: Tensor,
        frame: Frame,
        start: Tensor,
        iterations: int,
        limit: float,
        gradient: Gradient,
        reduce: Reduce,
    ) -> None:
        kind: type[Points] = ScalarPoints if vectors.shape[1] == 1 else VectorPoints
        points = kind(vectors, frame)
        self.points, self.gradient, self.reduce = points, gradient, reduce
        self.path: list[Tensor] = [start]
        self.masses: list[Tensor] = []
        self.all_moved: list[bool] = []
        for _ in range(iterations):
            before = self.path[-1]
            sums = reduce(points.sums(before))
            mass, moved = sums[:, -1:], sums[:, :-1] / sums[:, -1:]
            self.all_moved.append(mass.amin().item() > UNATTENDED)
            if not self.all_moved[-1]:
                moved = torch.where(mass > UNATTENDED, moved, before)
                mass = torch.where(mass > UNATTENDED, mass, torch.inf)
            self.path.append(moved)
            self.masses.append(mass)
            if limit and (moved - before).abs().amax() <= limit:
                break
        self.moved = self.path[-1]

    def soften(self, out: Tensor) -> None:
        """Write the soft weights to ``out [dim, n]``."""
        self.points.soften(self.path[-2], self.moved, out)

    def weight_gradient(self, cotangent: Tensor, out: Tensor) -> None:
        """Write the gradient with respect to the weights to ``out [dim, n]``."""
        points, path, masses = self.points, self.path, self.masses
        flowing = self.reduce(points.pull_values(cotangent))
        if self.gradient == "unrolled":
            for t in reversed(range(len(masses))):
                step, last = _sums_cotangent(flowing, path[t + 1], masses[t]), t == len(masses) - 1
                pulled = points.pull(path[t], step, output=last, keep=True, onward=t > 0)
                if t:
                    pulled = self.reduce(pulled)
                    # what stayed passes its gradient on as it is
                    stayed = torch.where(masses[t].isinf(), flowing, 0.0)
                    flowing = pulled if self.all_moved[t] else pulled + stayed
        else:
            through = points.pull(path[-2], None, output=True, keep=True, onward=True)
            flowing = flowing + self.reduce(through)
            if self.gradient == "implicit":
                # products with vectors are no more exact than the vectors
                tolerance = 0.1 * math.sqrt(torch.finfo(cotangent.dtype).eps)
                flowing = self._solve(flowing, tolerance)
            step = _sums_cotangent(flowing, path[-1], masses[-1])
            points.pull(path[-2], step, output=False, keep=True, onward=False)
        points.weight_gradient(out)

    def detach(self) -> list[Tensor]:
        """Hand over all large tensors, for autograd to keep."""
        return self.points.detach()

    def attach(self, tensors: list[Tensor]) -> None:
        """Take them back."""
        self.points.attach(tensors)

    def _solve(self, flowing: Tensor, tolerance: float) -> Tensor:
        """The gradient at the fixed point: ``z = flowing + J^T z``, ``J`` an iteration's Jacobian.

        Scalars have a ``k x k`` Jacobian to solve with. Vectors take GMRES, which needs products
        only.
        """
        before, after, mass = self.path[-2], self.path[-1], self.masses[-1]
        partial = self.points.jacobian(before, after)
        if partial is not None:
            jacobian = self.reduce(partial) / mass
            identity = torch.eye(len(jacobian), dtype=jacobian.dtype, device=jacobian.device)
            solution: Tensor = torch.linalg.solve(identity - jacobian.T, flowing)
            return solution

        def remainder(z: Tensor) -> Tensor:
            z = z.view_as(flowing)
            step = _sums_cotangent(z, after, mass)
            pulled = self.points.pull(before, step, output=False, keep=False, onward=True)
            return (z - self.reduce(pulled)).flatten()

        return gmres(remainder, flowing.flatten(), tolerance).view_as(flowing)


def _sums_cotangent(flowing: Tensor, moved: Tensor, mass: Tensor) -> Tensor:
    """Gradient with respect to `Points.sums` from that of their quotient ``moved``."""
    means = flowing / mass
    return torch.cat([means, -(means * moved).sum(1, keepdim=True)], 1)


def gmres(
    operator: Callable[[Tensor], Tensor], target: Tensor, tolerance: float, steps: int = 50
) -> Tensor:
    """Solve ``operator(z) = target`` for a flat float64 ``z`` (Saad and Schultz, 1986).

    Args:
        operator: linear.
        target: ``[m]``.
        tolerance: of the residual's norm, relative to that of ``target``.
        steps: the most calls of ``operator``.
    """
    norm = target.norm()
    if norm == 0:
        return torch.zeros_like(target)
    basis = [target / norm]
    columns: list[Tensor] = []
    weights = target.new_zeros(0)
    for size in range(1, min(steps, len(target)) + 1):
        image = operator(basis[-1])
        space = torch.stack(basis)
        # orthogonalised twice, as once leaves rounding errors behind
        first = space @ image
        image = image - space.T @ first
        second = space @ image
        image = image - space.T @ second
        length = image.norm()
        columns.append(torch.cat([first + second, length[None]]))
        hessenberg = target.new_zeros(size + 1, size)
        for index, column in enumerate(columns):
            hessenberg[: len(column), index] = column
        goal = target.new_zeros(size + 1)
        goal[0] = norm
        weights = torch.linalg.lstsq(hessenberg, goal[:, None]).solution[:, 0]
        if (hessenberg @ weights - goal).norm() <= tolerance * norm or length <= 1e-14 * norm:
            break
        basis.append(image / length)
    return torch.stack(basis[: len(weights)]).T @ weights
