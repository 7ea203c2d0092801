"""The training stage: float training, DKM fine-tuning, and hard palettes at the end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dkm_export.compress import (
    finalize,
    measure_sensitivity,
    prepare,
    set_temperature,
    soft_weights,
)
from dkm_export.errors import DkmWarning, InvalidInput
from dkm_export.folding import Folds, find_folds, fold
from dkm_export.layers import LayerPlan, plan, require_palettes
from dkm_export.palettized import PalettizedModel
from dkm_export.references import build_module
from dkm_export.samples import fixed_batches, run_reference
from dkm_export.sizing import Account, account, predict
from dkm_export.task import Task, batches_of, metric_of, output_of
from dkm_export.training.distributed import ALONE, World, gather, together
from dkm_export.training.loop import (
    Phase,
    Run,
    begin,
    keep_best,
    restore_best,
    save,
    task_loss,
    train_epoch,
)
from dkm_export.training.loop import Progress as Progress
from dkm_export.training.metrics import Epoch, Metrics, Sizes
from dkm_export.training.recipe import Recipe
from dkm_export.training.resume import ResumeFile, Standing, fingerprint
from dkm_export.training.weights import load_weights

_BATCH = 256
"""Test inputs that are evaluated at once."""

_LARGE_GAP = 0.05
"""Of the metric of soft weights: what hard ones may fall short of it without a warning."""


def plan_recipe(recipe: Recipe) -> tuple[list[LayerPlan], Account]:
    """What `run_recipe` would do to each layer, and to the bytes of the model.

    The file of weights need not be there.
    """
    model = build_module(recipe.model.factory, recipe.model.arguments)
    layers = plan(model, recipe.compression)
    fold(model, _folds(model, recipe))
    return layers, predict(layers, model.state_dict())


def run_recipe(
    recipe: Recipe,
    progress: Progress,
    *,
    world: World = ALONE,
    resume: ResumeFile | None = None,
) -> tuple[PalettizedModel, Metrics]:
    """Train and compress as ``recipe`` says.

    The same recipe and seed give the same result on the same machine, also when the run was cut
    off and went on from its resume file. Sets torch's seed and its handling of denormal numbers
    for the process.

    Args:
        recipe: what to do.
        progress: told after every step.
        world: the processes that train together; each gets the same result.
        resume: gets the state after every epoch; when the file is there, the run goes on from it.

    Raises:
        InvalidInput: when the model, task, weights, rules or resume file are not what they have
            to be, or the training diverges.
        DkmError: when the processes come to different weights.
    """
    with together(world):
        model, task = _load(recipe)
        folds = _folds(model, recipe, world)
        standing = resume.standing(recipe) if resume else None
    if any(other != standing for other in gather(standing, world)):
        raise InvalidInput("not every process sees the same resume file: use a folder they share")
    model.to(world.device)
    tuning = standing if standing and standing.phase == "dkm" else None
    mark = fingerprint(recipe) if resume else ""
    run = Run(recipe, model, task, progress, world, resume, mark) if task else None

    fp32 = tuning.fp32 if tuning else _train_float(run, standing) if run else None
    fold(model, folds)
    sensitivity = _sensitivity(run) if run and not tuning else None
    teacher = deepcopy(model).requires_grad_(False) if recipe.dkm.distillation else None
    prepare(
        model,
        recipe.compression,
        recipe.dkm,
        seed=recipe.seed,
        sensitivity=sensitivity,
        progress=progress,
    )
    epochs = _fine_tune(run, teacher, fp32, tuning) if run and recipe.dkm.epochs else ()
    model.eval()
    hard = _evaluate(run) if run else None

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
            account=account(palettized),
        ),
    )


def float_model(recipe: Recipe, progress: Progress) -> tuple[nn.Module, Task | None, float | None]:
    """The model that `run_recipe` would palettize, on one CPU, in eval mode.

    Returns:
        The model with its batch norms folded if the recipe wants that, the task, and the metric.

    Raises:
        InvalidInput: as `run_recipe`.
    """
    model, task = _load(recipe)
    folds = _folds(model, recipe)
    run = Run(recipe, model, task, progress, ALONE, None, "") if task else None
    fp32 = _train_float(run, None) if run else None
    fold(model, folds)
    return model.eval(), task, fp32


def importance_of(recipe: Recipe, model: nn.Module, task: Task | None) -> dict[str, Tensor] | None:
    """How much the weights of a `float_model` count for their centroids, if the recipe wants it."""
    if task is None:
        return None
    return _sensitivity(Run(recipe, model, task, lambda *status: None, ALONE, None, ""))


def evaluate(model: nn.Module, task: Task) -> float:
    """The task's metric over the test split, with ``model`` in the mode and place that it is in."""
    device = next(model.parameters()).device
    with torch.no_grad(), parametrize.cached():
        results = [
            (output_of(model, [tensor.to(device) for tensor in inputs]).cpu(), target)
            for inputs, target in batches_of(task, "test", _BATCH)
        ]
    outputs, targets = zip(*results, strict=True)
    return metric_of(task, torch.cat(outputs), torch.cat(targets))


def _evaluate(run: Run) -> float:
    with together(run.world):
        return evaluate(run.model, run.task)


def _train_float(run: Run, standing: Standing | None) -> float:
    """The first phase, if there is one; returns the metric of the float model."""
    if run.recipe.train and run.recipe.train.epochs:
        phase = begin(run, "fp32", run.recipe.train, standing)
        for epoch in phase.remaining:
            train_epoch(run, phase, epoch)
            save(run, phase, epoch)
    run.model.eval()
    return _evaluate(run)


def _sensitivity(run: Run) -> dict[str, Tensor] | None:
    """What `prepare` takes as such; every rank measures all of it."""
    section, device = run.recipe.dkm, run.world.device
    if not section.sensitivity_batches:
        return None
    batches = batches_of(run.task, "train", section.batch_size, run.recipe.seed)

    def losses() -> Iterator[Tensor]:
        for inputs, target in islice(batches, section.sensitivity_batches):
            moved = tuple(tensor.to(device) for tensor in inputs)
            yield task_loss(run.model, run.task, moved, target.to(device))[0]

    run.model.eval()
    with together(run.world):
        return measure_sensitivity(run.model, losses())


def _fine_tune(
    run: Run, teacher: nn.Module | None, fp32: float | None, standing: Standing | None
) -> tuple[Epoch, ...]:
    """The second phase, of the prepared model; returns what each epoch ended with."""
    section = run.recipe.dkm
    best = section.keep == "best"
    phase = begin(run, "dkm", section, standing, teacher=teacher, keep_best=best)
    epochs = standing.epochs if standing else ()
    for epoch in phase.remaining:
        left = (section.epochs - epoch) / max(1, section.epochs - 1)
        tau = section.tau_end * (section.tau / section.tau_end) ** left
        set_temperature(run.model, tau)
        loss = train_epoch(run, phase, epoch)
        run.model.eval()
        with soft_weights(run.model):
            soft = _evaluate(run)
        hard = _evaluate(run)
        ended = Epoch(epoch=epoch, tau=tau, loss=loss, soft=soft, hard=hard, gap=soft - hard)
        # of equal epochs the last, in which the clusters are hardest
        if best and all(hard >= earlier.hard for earlier in epochs):
            keep_best(run, phase)
        epochs = (*epochs, ended)
        save(run, phase, epoch, fp32, epochs)
        _tell(run, phase, ended)
    if best:
        restore_best(run, phase)
    return epochs


def _tell(run: Run, phase: Phase, ended: Epoch) -> None:
    """How an epoch went, and a warning when the artifact would be worse than the training."""
    section = run.recipe.dkm
    of_all = f"dkm epoch {ended.epoch}/{section.epochs}"
    status = f"{of_all}, loss {ended.loss:.4f}, soft {ended.soft:.2f}, hard {ended.hard:.2f}"
    run.progress(status, ended.epoch * phase.steps, section.epochs * phase.steps)
    if run.world.leads and ended.gap > _LARGE_GAP * abs(ended.soft):
        warnings.warn(
            f"{of_all}: hard weights reach {ended.hard:.2f} where soft ones reach "
            f"{ended.soft:.2f}: if the gap stays when tau has fallen from {ended.tau:.3g} to "
            f"{section.tau_end:.3g}, lower tau_end or train more epochs",
            DkmWarning,
            stacklevel=2,
        )


def _try_out(model: nn.Module, task: Task | None, recipe: Recipe) -> None:
    """What is wrong with a recipe should show before the training, not after it."""
    require_palettes(plan(model, recipe.compression))
    run_reference(model.eval(), recipe.model.example_inputs(), recipe.model)
    if task is None:
        return
    for inputs, target in islice(fixed_batches(task, recipe.model), 1):
        output, *_ = run_reference(model, inputs, recipe.model)
        metric_of(task, output[: len(target)], target)
        task_loss(model, task, inputs, target)


def _folds(model: nn.Module, recipe: Recipe, world: World = ALONE) -> Folds:
    """What the recipe wants folded once the float training is over."""
    if recipe.model.batch_norm == "separate":
        return Folds()
    folds = find_folds(model, recipe.model.example_inputs())
    if world.leads:
        folds.warn_of_others()
    return folds


def _load(recipe: Recipe) -> tuple[nn.Module, Task | None]:
    """The model with its weights, and the task; tried out."""
    torch.manual_seed(recipe.seed)
    # The tails of the attention are denormal numbers, which CPUs compute slowly.
    torch.set_flush_denormal(True)
    model = _load_model(recipe)
    task = recipe.task.load() if recipe.task else None
    _try_out(model, task, recipe)
    return model, task


def _load_model(recipe: Recipe) -> nn.Module:
    model = build_module(recipe.model.factory, recipe.model.arguments)
    if recipe.model.weights is not None:
        load_weights(model, recipe.model.weights, f"the model of '{recipe.model.factory}'")
    return model
