"""The training loop: one epoch of one phase, on one process or several, with its state kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dkm_export.errors import InvalidInput
from dkm_export.sharding import full, load
from dkm_export.task import (
    Batch,
    Task,
    batches_of,
    distillation_of,
    loss_of,
    output_of,
    size_of,
)
from dkm_export.training.distributed import (
    World,
    follow_leader,
    mean,
    replicate,
    require_equal,
    share,
    shares,
    spread_out,
    together,
)
from dkm_export.training.metrics import Epoch
from dkm_export.training.optimizer import learning_rate, make_optimizer
from dkm_export.training.recipe import Recipe, TrainSection
from dkm_export.training.resume import PhaseName, ResumeFile, Standing, training_state

_SEEDS_PER_RUN = 10_000
"""Each epoch of each seed shuffles by its own seed."""

Progress = Callable[[str, int, int], None]
"""Told a status, whose first word is the phase, steps done, and steps in all of the phase."""


@dataclass(frozen=True)
class Run:
    """What the phases of a run share.

    Attributes:
        model: the bare one, on the world's device.
        resume: gets the state after each epoch, with ``fingerprint`` in it.
    """

    recipe: Recipe
    model: nn.Module
    task: Task
    progress: Progress
    world: World
    resume: ResumeFile | None
    fingerprint: str


@dataclass(frozen=True)
class Phase:
    """One phase of training.

    Attributes:
        replica: the model as training calls it.
        teacher: the float model, when the phase distils it.
        best: the state dict at the end of the best epoch, when the phase keeps it; filled in place.
        done: epochs that an earlier process has trained.
        steps: per epoch.
    """

    name: PhaseName
    section: TrainSection
    replica: nn.Module
    optimizer: torch.optim.Optimizer
    done: int
    steps: int
    teacher: nn.Module | None = None
    best: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def remaining(self) -> range:
        """Numbers of the epochs that are left; the first of all is 1."""
        return range(self.done + 1, self.section.epochs + 1)


def begin(
    run: Run,
    name: PhaseName,
    section: TrainSection,
    standing: Standing | None,
    *,
    teacher: nn.Module | None = None,
    keep_best: bool = False,
) -> Phase:
    """Make what a phase trains with, and load what an earlier process has trained.

    Args:
        run: with a model that is prepared when the phase is ``dkm``.
        name: of the phase.
        section: of the recipe.
        standing: what the resume file says, when it is of this phase.
        teacher: see `Phase`.
        keep_best: whether the phase keeps the weights of its best epoch.

    Raises:
        InvalidInput: when the resume file does not fit the model or the data.
    """
    sharded = name == "dkm" and run.recipe.dkm.shard
    replica = (spread_out if sharded else replicate)(run.model, run.world)
    optimizer = make_optimizer(run.model, section)
    best = _copy(run.model) if keep_best else {}
    with together(run.world):
        steps = -(-size_of(run.task, "train") // section.batch_size)
        done = standing.done if standing else 0
        phase = Phase(name, section, replica, optimizer, done, steps, teacher, best)
        if run.resume and standing:
            run.resume.restore(standing, steps, _state(run, phase))
    return phase


def save(
    run: Run, phase: Phase, done: int, fp32: float | None = None, epochs: tuple[Epoch, ...] = ()
) -> None:
    """Write the state after ``done`` epochs to the run's resume file, if it has one."""
    if run.resume is None:
        return
    standing = Standing(
        fingerprint=run.fingerprint,
        phase=phase.name,
        done=done,
        steps=phase.steps,
        fp32=fp32,
        epochs=epochs,
    )
    tensors = {name: full(tensor.detach()) for name, tensor in _state(run, phase).items()}
    with together(run.world):
        if run.world.leads:
            run.resume.write(standing, tensors)


def train_epoch(run: Run, phase: Phase, epoch: int) -> float:
    """Train one epoch, the first of which is 1; returns the mean loss of its batches.

    Raises:
        InvalidInput: with phase, epoch and step, when the loss is not finite or the user's code
            fails.
        DkmError: when the ranks come to different weights.
    """
    world, section, seed = run.world, phase.section, run.recipe.seed
    all_steps = phase.steps * section.epochs
    phase.replica.train()
    # Numbers drawn in an epoch depend on nothing before it, so a resumed run draws the same.
    torch.manual_seed(_seed_of(seed, phase.name, epoch, world.rank))
    shuffle = seed * _SEEDS_PER_RUN + epoch - 1
    batches = batches_of(run.task, "train", section.batch_size, seed=shuffle)
    total = 0.0
    for step, (batch, weight) in enumerate(shares(batches, world), 1):
        where = f"{phase.name} epoch {epoch}, step {step}"
        done = min((epoch - 1) * phase.steps + step, all_steps)
        for group in phase.optimizer.param_groups:
            group["lr"] = learning_rate(section, done - 1, phase.steps)
        phase.optimizer.zero_grad()
        for number in range(section.accumulate):
            with together(world), _located(where):
                part, partial = share(batch, number, section.accumulate)
                loss = _loss(run, phase, part) * (weight * partial / section.accumulate)
            value = mean(loss.item(), world)
            if not math.isfinite(value):
                raise InvalidInput(f"{where}: the loss is {value}: lower the learning rate")
            loss.backward()
            total += value
        phase.optimizer.step()
        status = f"{phase.name} epoch {epoch}/{section.epochs}, loss {total / step:.4f}"
        run.progress(status, done, all_steps)
    follow_leader(run.model, world)
    require_equal(_same_everywhere(run.model), world)
    return total / step


def task_loss(
    model: nn.Module, task: Task, inputs: tuple[Tensor, ...], target: Tensor
) -> tuple[Tensor, Tensor]:
    """The task's loss of ``model``, a scalar that can be differentiated, and what it is of.

    Raises:
        InvalidInput: when the model or the task fails.
    """
    output = output_of(model, inputs, "the model in training")
    return loss_of(task, output, target), output


def keep_best(run: Run, phase: Phase) -> None:
    """Take the weights of now for those of the best epoch; all ranks have to call it."""
    for name, tensor in _copy(run.model).items():
        phase.best[name].copy_(tensor)


def restore_best(run: Run, phase: Phase) -> None:
    """Give the model the weights of the phase's best epoch back."""
    with torch.no_grad():
        for name, tensor in run.model.state_dict().items():
            load(tensor, phase.best[name])


def _loss(run: Run, phase: Phase, batch: Batch) -> Tensor:
    """What a part of a batch contributes: the task's loss and that of the distillation."""
    device, dkm = run.world.device, run.recipe.dkm
    inputs, target = tuple(tensor.to(device) for tensor in batch[0]), batch[1].to(device)
    lower = phase.section.precision == "bfloat16"
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=lower):
        loss, output = task_loss(phase.replica, run.task, inputs, target)
        if phase.teacher is None:
            return loss
        with torch.no_grad():
            goal = output_of(phase.teacher, inputs, "the float model")
        alike = distillation_of(run.task, output, goal, dkm.distillation_temperature)
        return (1 - dkm.distillation) * loss + dkm.distillation * alike


def _state(run: Run, phase: Phase) -> dict[str, Tensor]:
    """Everything that a resumed run needs, by its name in the file; each tensor the run's own."""
    state = training_state(run.model, phase.optimizer)
    state |= {f"best.{name}": tensor for name, tensor in phase.best.items()}
    if phase.teacher is not None:
        state |= {f"teacher.{name}": t for name, t in phase.teacher.state_dict().items()}
    return state


def _copy(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state dict, on this process too where it holds a part."""
    return {name: full(tensor.detach()).clone() for name, tensor in model.state_dict().items()}


def _seed_of(*parts: object) -> int:
    """A seed for torch, another for every combination of ``parts``."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8])


def _same_everywhere(model: nn.Module) -> dict[str, Tensor]:
    """What every rank computes alike: not the statistics that batch norm takes of its share."""
    clusters = {name: b for name, b in model.named_buffers() if ".parametrizations." in f".{name}"}
    parameters = {name: full(parameter.detach()) for name, parameter in model.named_parameters()}
    return parameters | clusters


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Say in an error where in the training it came up."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from error
