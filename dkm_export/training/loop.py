"""The training loop: one epoch of one phase, on one process or several, with its state kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dkm_export.errors import InvalidInput
from dkm_export.sharding import full
from dkm_export.task import Task, batches_of, loss_of, size_of, user_code
from dkm_export.training.distributed import (
    World,
    follow_leader,
    mean,
    replicate,
    require_equal,
    shares,
    spread_out,
    together,
)
from dkm_export.training.metrics import Epoch
from dkm_export.training.recipe import Recipe, TrainSection
from dkm_export.training.resume import PhaseName, ResumeFile, Standing, adam, training_state

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
        done: epochs that an earlier process has trained.
        steps: per epoch.
    """

    name: PhaseName
    section: TrainSection
    replica: nn.Module
    optimizer: torch.optim.Optimizer
    done: int
    steps: int

    @property
    def remaining(self) -> range:
        """Numbers of the epochs that are left; the first of all is 1."""
        return range(self.done + 1, self.section.epochs + 1)


def begin(run: Run, name: PhaseName, section: TrainSection, standing: Standing | None) -> Phase:
    """Make what a phase trains with, and load what an earlier process has trained.

    Args:
        run: with a model that is prepared when the phase is ``dkm``.
        name: of the phase.
        section: of the recipe.
        standing: what the resume file says, when it is of this phase.

    Raises:
        InvalidInput: when the resume file does not fit the model or the data.
    """
    sharded = name == "dkm" and run.recipe.dkm.shard
    replica = (spread_out if sharded else replicate)(run.model, run.world)
    optimizer = adam(run.model, section.learning_rate)
    with together(run.world):
        steps = -(-size_of(run.task, "train") // section.batch_size)
        if run.resume and standing:
            run.resume.restore(standing, steps, run.model, optimizer)
    done = standing.done if standing else 0
    return Phase(name, section, replica, optimizer, done, steps)


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
    tensors = training_state(run.model, phase.optimizer)
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
    for step, ((inputs, target), weight) in enumerate(shares(batches, world), 1):
        where = f"{phase.name} epoch {epoch}, step {step}"
        done = min((epoch - 1) * phase.steps + step, all_steps)
        with together(world), _located(where):
            inputs = tuple(tensor.to(world.device) for tensor in inputs)
            loss = training_loss(phase.replica, run.task, inputs, target.to(world.device)) * weight
        value = mean(loss.item(), world)
        if not math.isfinite(value):
            raise InvalidInput(f"{where}: the loss is {value}: lower the learning rate")
        for group in phase.optimizer.param_groups:
            group["lr"] = section.learning_rate * _cosine((done - 1) / all_steps)
        phase.optimizer.zero_grad()
        loss.backward()
        phase.optimizer.step()
        total += value
        status = f"{phase.name} epoch {epoch}/{section.epochs}, loss {total / step:.4f}"
        run.progress(status, done, all_steps)
    follow_leader(run.model, world)
    require_equal(_same_everywhere(run.model), world)
    return total / step


def training_loss(
    model: nn.Module, task: Task, inputs: tuple[Tensor, ...], target: Tensor
) -> Tensor:
    """The task's loss of ``model``, a scalar that can be differentiated.

    Raises:
        InvalidInput: when the model or the task fails.
    """
    with user_code("the model in training"):
        output = model(*inputs)
    return loss_of(task, output, target)


def _cosine(part: float) -> float:
    """From 1 to 0 along a cosine: of the step alone, so that a resumed run needs no history."""
    return (1 + math.cos(math.pi * part)) / 2


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
