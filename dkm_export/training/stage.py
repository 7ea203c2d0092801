"""The training stage: float training, DKM fine-tuning, and hard palettes at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dkm_export.compress import finalize, prepare, set_temperature, soft_weights
from dkm_export.errors import InvalidInput
from dkm_export.layers import LayerPlan, plan, require_palettes
from dkm_export.palettized import PalettizedModel, load_state
from dkm_export.references import build_module, load_task
from dkm_export.samples import fixed_batches, run_reference
from dkm_export.spec import Frozen
from dkm_export.task import Task, batches_of, loss_of, metric_of, size_of, user_code
from dkm_export.training.recipe import Recipe, TrainSection

_BATCH = 256
"""Test inputs that are evaluated at once."""

_SEEDS_PER_RUN = 10_000
"""Each epoch of each seed shuffles by its own seed."""

Progress = Callable[[str, int, int], None]
"""Told a status, whose first word is the phase, steps done, and steps in all of the phase."""


class Epoch(Frozen):
    """What one epoch of DKM fine-tuning ended with.

    Attributes:
        loss: mean over the epoch's batches.
        soft: the task's metric with soft weights, as the training saw them.
        hard: the metric with hard weights, as the artifact will have them.
        gap: ``soft - hard``; when it stays large, ``tau_end`` is too high.
    """

    epoch: int
    tau: float
    loss: float
    soft: float
    hard: float
    gap: float


class Sizes(Frozen):
    """Bytes of the weights: palettes (packed indices and float16 LUTs), the rest, and float32."""

    palettes: int
    dense: int
    fp32: int


class Metrics(Frozen):
    """``metrics.json``. The metrics are None for a model without a task."""

    schema_version: Literal[1] = 1
    seed: int
    metric: str | None
    fp32: float | None
    epochs: tuple[Epoch, ...]
    hard: float | None
    sizes: Sizes


def plan_recipe(recipe: Recipe) -> tuple[list[LayerPlan], int]:
    """What `run_recipe` would do to each layer, and the bytes of everything else in the model."""
    model = _load_model(recipe)
    layers = plan(model, recipe.compression)
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    return layers, whole - sum(4 * layer.layout.size for layer in layers)


def run_recipe(recipe: Recipe, progress: Progress) -> tuple[PalettizedModel, Metrics]:
    """Train and compress as ``recipe`` says.

    The same recipe and seed give the same result on the same machine. Sets torch's seed and its
    handling of denormal numbers for the process.

    Raises:
        InvalidInput: when the model, task, weights or rules are not what they have to be,
            or the training diverges.
    """
    torch.manual_seed(recipe.seed)
    # The tails of the attention are denormal numbers, which CPUs compute slowly.
    torch.set_flush_denormal(True)
    model = _load_model(recipe)
    task = load_task(recipe.task) if recipe.task else None
    _try_out(model, task, recipe)
    if task and recipe.train:
        for _ in _train(model, task, recipe.train, recipe.seed, "fp32", progress):
            pass
    fp32 = evaluate(model.eval(), task) if task else None
    prepare(model, recipe.compression, recipe.dkm, seed=recipe.seed, progress=progress)
    epochs = tuple(_fine_tune(model, task, recipe, progress)) if task and recipe.dkm.epochs else ()
    hard = evaluate(model.eval(), task) if task else None
    measured = {"fp32": fp32, "hard": hard}
    palettized = finalize(
        model,
        recipe.source(),
        {name: value for name, value in measured.items() if value is not None},
    )
    return palettized, Metrics(
        seed=recipe.seed,
        metric=task.metric_name if task else None,
        fp32=fp32,
        epochs=epochs,
        hard=hard,
        sizes=Sizes(
            palettes=sum(palette.nbytes for palette in palettized.palettes.values()),
            dense=sum(tensor.nbytes for tensor in palettized.dense.values()),
            fp32=palettized.fp32_bytes,
        ),
    )


def evaluate(model: nn.Module, task: Task) -> float:
    """The task's metric over the test split, with ``model`` in the mode that it is in."""
    with torch.no_grad(), parametrize.cached():
        results = [(model(*inputs), target) for inputs, target in batches_of(task, "test", _BATCH)]
    outputs, targets = zip(*results, strict=True)
    return metric_of(task, torch.cat(outputs), torch.cat(targets))


def _fine_tune(model: nn.Module, task: Task, recipe: Recipe, progress: Progress) -> Iterator[Epoch]:
    section = recipe.dkm
    taus = [
        section.tau * (section.tau_end / section.tau) ** (epoch / max(1, section.epochs - 1))
        for epoch in range(section.epochs)
    ]
    set_temperature(model, taus[0])
    for epoch, loss in enumerate(_train(model, task, section, recipe.seed, "dkm", progress)):
        model.eval()
        with soft_weights(model):
            soft = evaluate(model, task)
        hard = evaluate(model, task)
        yield Epoch(
            epoch=epoch + 1, tau=taus[epoch], loss=loss, soft=soft, hard=hard, gap=soft - hard
        )
        set_temperature(model, taus[min(epoch + 1, section.epochs - 1)])


def _train(
    model: nn.Module, task: Task, section: TrainSection, seed: int, name: str, progress: Progress
) -> Iterator[float]:
    """Train, and yield after each epoch the mean loss of its batches."""
    batches = -(-size_of(task, "train") // section.batch_size)
    steps = max(1, batches * section.epochs)
    optimizer = torch.optim.Adam(model.parameters(), lr=section.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for epoch in range(section.epochs):
        model.train()
        total = 0.0
        shuffle = seed * _SEEDS_PER_RUN + epoch
        for batch, (inputs, target) in enumerate(
            batches_of(task, "train", section.batch_size, seed=shuffle), 1
        ):
            loss = _loss(model, task, inputs, target)
            if not torch.isfinite(loss):
                raise InvalidInput(
                    f"{name}: the loss is {loss.item()} in epoch {epoch + 1}: "
                    "lower the learning rate"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            status = f"{name} epoch {epoch + 1}/{section.epochs}, loss {total / batch:.4f}"
            progress(status, min(epoch * batches + batch, steps), steps)
        yield total / batch


def _loss(model: nn.Module, task: Task, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
    with user_code("the model in training"):
        output = model(*inputs)
    return loss_of(task, output, target)


def _try_out(model: nn.Module, task: Task | None, recipe: Recipe) -> None:
    """What is wrong with a recipe should show before the training, not after it."""
    require_palettes(plan(model, recipe.compression))
    run_reference(model.eval(), recipe.model.example_inputs(), recipe.model)
    if task is None:
        return
    for inputs, target in islice(fixed_batches(task, recipe.model), 1):
        output, *_ = run_reference(model, inputs, recipe.model)
        metric_of(task, output[: len(target)], target)
        _loss(model, task, inputs, target)


def _load_model(recipe: Recipe) -> nn.Module:
    model = build_module(recipe.model.factory, recipe.model.arguments)
    if recipe.model.weights is not None:
        state = _read_weights(recipe.model.weights)
        load_state(model, state, f"the model of '{recipe.model.factory}'")
    return model


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InvalidInput(f"{path}: no such file") from error
    except UnpicklingError as error:
        raise InvalidInput(
            f"{path}: holds more than tensors, and unpickling it could run code: "
            "save the state dict as safetensors"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidInput(
            f"{path}: neither safetensors nor a plain state dict: {reason}"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise InvalidInput(f"{path}: holds no plain state dict of tensors by name")
    return state
