"""Several processes that train one model: torchrun starts them, each takes a share of every batch.

All ranks do the same steps in the same order. What one rank alone can find wrong is found inside
`together`, so that all of them stop at the same place instead of waiting for one that has gone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dkm_export.compress import shard
from dkm_export.errors import DkmError, InvalidInput
from dkm_export.task import Batch

_LEADER = 0
_MEETING = timedelta(seconds=10)

_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """The processes of this run, and this one's place among them.

    Attributes:
        rank: of this process; rank 0 leads: it prints and writes.
        size: number of processes.
        group: gloo, for the processes' own agreements; None for a process that is alone.
        device: where this process trains.
    """

    rank: int = _LEADER
    size: int = 1
    group: dist.ProcessGroup | None = None
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == _LEADER


ALONE = World()


@contextmanager
def processes() -> Iterator[World]:
    """The processes that torchrun started, connected; `ALONE` without torchrun.

    Gradients go through NCCL when this machine has a GPU for each of its processes, else through
    gloo on CPUs.

    Raises:
        InvalidInput: when torchrun's variables are malformed, or the processes do not connect.
    """
    rank, size = _variable("RANK", 0), _variable("WORLD_SIZE", 1)
    if size == 1:
        yield ALONE
        return
    device = _device()
    try:
        if device == "cpu":
            dist.init_process_group("gloo")
        else:
            dist.init_process_group("nccl", device_id=torch.device(device))
        group = dist.new_group(backend="gloo")
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidInput(
            f"rank {rank} of {size} does not reach the others: {reason}: start it with torchrun"
        ) from error
    assert isinstance(group, dist.ProcessGroup)
    try:
        yield World(rank, size, group, device)
    finally:
        dist.destroy_process_group()


def replicate(model: nn.Module, world: World) -> nn.Module:
    """``model`` to call in training: its gradients are the means over all ranks.

    It shares ``model``'s parameters and buffers, and every call starts from rank 0's buffers.
    """
    if world.group is None:
        return model
    return DistributedDataParallel(model)


def spread_out(model: nn.Module, world: World) -> nn.Module:
    """Leave each rank a part of all parameters of a prepared model: FSDP2 around `shard`.

    The result is ``model`` itself, with gradients that are the means over all ranks.
    """
    if world.group is None:
        return model
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    fully_shard(model, mesh=mesh, ignored_params=shard(model, mesh))
    return model


def share(batch: Batch, number: int, count: int) -> tuple[Batch, float]:
    """One of ``count`` consecutive parts of a batch, and the weight of the part's mean loss.

    With these weights the mean over all parts is that over the whole batch, however it splits.

    Raises:
        InvalidInput: when inputs and targets differ in their number of examples.
    """
    if count == 1:
        return batch, 1.0
    inputs, target = batch
    total = len(target)
    if any(len(tensor) != total for tensor in inputs):
        raise InvalidInput(
            f"the task's batch has {[len(tensor) for tensor in inputs]} inputs and {total} "
            "targets: it can only be split when axis 0 is the example"
        )
    start, end = (total * part // count for part in (number, number + 1))
    # Without an example, a rank still has to take part: with one that counts for nothing.
    part = slice(start, end) if start < end else slice(0, 1)
    weight = (end - start) * count / max(1, total)
    return (tuple(tensor[part] for tensor in inputs), target[part]), weight


def shares(batches: Iterable[Batch], world: World) -> Iterator[tuple[Batch, float]]:
    """This rank's `share` of every batch; what goes wrong with the data of one rank stops all."""
    remaining = iter(batches)
    while True:
        with together(world):
            batch = next(remaining, None)
            part = None if batch is None else share(batch, world.rank, world.size)
        if part is None:
            return
        yield part


def gather(value: _T, world: World) -> list[_T]:
    """Every rank's ``value``, in the order of ranks, on every rank."""
    if world.group is None:
        return [value]
    values = [value] * world.size
    dist.all_gather_object(values, value, group=world.group)
    return values


def mean(value: float, world: World) -> float:
    """The mean of the ranks' values, the same on every rank."""
    if world.group is None:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total, group=world.group)
    return total.item() / world.size


@contextmanager
def together(world: World) -> Iterator[None]:
    """When the body fails on some ranks, the first of these failures is raised on all of them.

    The body must not wait for other ranks after a point where it can fail.

    Raises:
        DkmError: what the body raised; an `OSError` of a body becomes an `InvalidInput`.
    """
    if world.group is None:
        yield
        return
    failure: DkmError | None = None
    try:
        yield
    except DkmError as error:
        failure = error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        failure = InvalidInput(f"{where}{error.strerror or error}")
    if mean(failure is not None, world):
        raise next(error for error in gather(failure, world) if error) from failure


def meet(world: World) -> None:
    """Wait for the other ranks, but not for one that is gone."""
    with suppress(RuntimeError):
        dist.monitored_barrier(world.group, _MEETING)


def require_equal(tensors: Mapping[str, Tensor], world: World) -> None:
    """Compare tensors that should be the same on all ranks, bit for bit.

    Raises:
        DkmError: on every rank, with the first tensor that differs.
    """
    if world.group is None:
        return
    leader, *others = gather({name: _digest(tensor) for name, tensor in tensors.items()}, world)
    for rank, digests in enumerate(others, 1):
        for name, digest in leader.items():
            if digests.get(name) != digest:
                raise DkmError(
                    f"{name}: rank {rank} has come to other values than rank 0: train on equal "
                    "machines, with a task and a model that do the same on each"
                )


def follow_leader(model: nn.Module, world: World) -> None:
    """Give every rank the buffers of rank 0, as its next call in training would."""
    if world.group is None:
        return
    for buffer in model.buffers():
        value = buffer.detach().contiguous()
        dist.broadcast(value, _LEADER)
        buffer.detach().copy_(value)


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().reshape(-1).contiguous()
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def _device() -> str:
    """A GPU of its own for each process of this machine, or the CPU for all of them."""
    if torch.cuda.device_count() < _variable("LOCAL_WORLD_SIZE", 1):
        return "cpu"
    local = _variable("LOCAL_RANK", 0)
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InvalidInput(f"the environment variable {name} is '{text}', not a number")
    return int(text)
