"""Weights that several processes hold a part of each: DTensors, cut so that no vector is split.

Every process clusters its part; sums over all parts make the centroids (see
`dkm_export.clustering.Reduce`), and the soft parts are put together for the layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dkm_export.errors import InvalidInput
from dkm_export.palette import Layout


class Part:
    """This process's part of a weight, which is all of it where nothing is sharded.

    Attributes:
        local: the part.
        layout: how the part is cut into vectors.
    """

    def __init__(self, name: str, weight: Tensor, layout: Layout) -> None:
        self.local, self.layout = weight, layout
        self._whole: DTensor | None = None
        self._cut = False
        if not isinstance(weight, DTensor):
            return
        place, *more = weight.placements
        if more or not isinstance(place, Shard | Replicate):
            raise InvalidInput(
                f"{name}: a weight placed as {list(weight.placements)} cannot be clustered, "
                "allowed: one Shard or Replicate, on a mesh of one dimension: use dkm_export.shard"
            )
        self._whole = weight
        self.local = weight.to_local()
        if isinstance(place, Replicate):
            return
        self._cut = True
        axis, size = place.dim, weight.device_mesh.size()
        if not _fits(layout, axis, size):
            raise InvalidInput(
                f"{name}: {size} parts of axis {axis} ({layout.shape[axis]}) would be empty or "
                f"split vectors of dim {layout.dim} along axis {layout.axis} or {layout.groups} "
                "groups of axis 0: use dkm_export.shard, which chooses the axis"
            )
        self.layout = replace(layout, shape=tuple(self.local.shape))

    @property
    def cut(self) -> bool:
        """Whether other processes hold other parts."""
        return self._cut

    def reduce(self, sums: Tensor) -> Tensor:
        """``sums`` added up over all processes that hold a part."""
        if self._whole is not None and self._cut:
            sums = sums.contiguous()
            dist.all_reduce(sums, group=self._whole.device_mesh.get_group())
        return sums

    def whole(self, part: Tensor) -> Tensor:
        """The tensor that ``part`` is this process's part of, as a plain tensor.

        Processes may see different data: the part's gradient is the mean over all of them.
        """
        if self._whole is None:
            return part
        gathered: Tensor = _Gather.apply(part, self._whole)  # type: ignore[no-untyped-call]
        return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, like: DTensor) -> Tensor:
        ctx.mesh, ctx.placements = like.device_mesh, like.placements
        parts = DTensor.from_local(
            part.detach().contiguous(),
            ctx.mesh,
            ctx.placements,
            shape=like.shape,
            stride=like.stride(),
        )
        return parts.full_tensor()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        mean = gradient / ctx.mesh.size()
        dist.all_reduce(mean, group=ctx.mesh.get_group())
        replicated = DTensor.from_local(mean, ctx.mesh, [Replicate()], run_check=False)
        return replicated.redistribute(placements=ctx.placements).to_local(), None


def cut_axis(layout: Layout, size: int) -> int | None:
    """The longest axis along which a weight can be cut into ``size`` parts between its vectors."""
    fitting = [axis for axis in range(len(layout.shape)) if _fits(layout, axis, size)]
    return max(fitting, key=lambda axis: layout.shape[axis], default=None)


def distribute(weight: nn.Parameter, mesh: DeviceMesh, axis: int | None) -> nn.Parameter:
    """``weight``, the same on every process, as a parameter of which each keeps a part.

    Args:
        weight: plain.
        mesh: of one dimension.
        axis: to cut along; with None, each process keeps all.
    """
    place = Replicate() if axis is None else Shard(axis)
    part = distribute_tensor(weight.detach(), mesh, [place], src_data_rank=None)
    return nn.Parameter(part, requires_grad=weight.requires_grad)


def full(tensor: Tensor) -> Tensor:
    """A plain tensor with all parts of ``tensor``; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load(tensor: Tensor, whole: Tensor) -> None:
    """Copy ``whole`` into ``tensor``, of which each process may hold a part."""
    if isinstance(tensor, DTensor):
        parts = distribute_tensor(
            whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
        local(tensor).copy_(local(parts))
    else:
        tensor.copy_(whole)


def local(tensor: Tensor) -> Tensor:
    """This process's part of ``tensor``, itself and no copy."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def version(tensor: Tensor) -> object:
    """Changes with most changes of ``tensor``, see `DkmWeight`."""
    return local(tensor)._version


def _fits(layout: Layout, axis: int, size: int) -> bool:
    """Whether ``size`` parts along ``axis`` hold something, and whole vectors and groups."""
    length = layout.shape[axis]
    part = -(-length // size)
    if part * (size - 1) >= length or (axis == 0 and layout.groups > 1):
        return False
    return axis != layout.axis or part % layout.dim == 0
