"""From a recipe and a budget to the recipe that makes the most of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import count, islice
from math import ceil
from pathlib import Path

import torch
from torch import Tensor, nn

from dkm_export.compress import prepare
from dkm_export.errors import InvalidInput
from dkm_export.palette import Layout, palette_size
from dkm_export.palettized import ModelSource
from dkm_export.planning.allocation import Allocation, Options, front, lower_bound
from dkm_export.planning.candidates import (
    Candidate,
    Pins,
    Setting,
    Targets,
    candidates,
    spec_of,
)
from dkm_export.planning.costs import Costs
from dkm_export.planning.fitting import MOST_MEASUREMENTS, fit
from dkm_export.planning.mockup import artifact_bytes, mock_up
from dkm_export.planning.result import Plan, PlannedLayer, Point
from dkm_export.planning.sensitivities_file import (
    Method,
    Sensitivities,
    read_sensitivities,
    sensitivities,
)
from dkm_export.planning.sensitivity import (
    Calibration,
    Divergence,
    Outputs,
    Progress,
    scales_of,
)
from dkm_export.references import build_module
from dkm_export.spec import CompressionSpec
from dkm_export.task import Task, batches_of, distillation_of
from dkm_export.training.recipe import Recipe
from dkm_export.training.stage import evaluate, float_model, importance_of

_BATCHES = 8
"""Batches that the calibration examples come in."""

_MOST_POINTS = 100
"""Of the front that a plan tells."""

_NO_PALETTE = "no layer gets a palette: allow fewer bytes, or exclude less"

_TEMPERATURE = 1.0
"""Of outputs whose divergence is measured, for tasks that have such a thing."""


@dataclass(frozen=True)
class Budget:
    """What the plan has to keep to; one of these.

    Attributes:
        limit: bytes that no target's artifact may exceed.
        bits_per_weight: bits of indices and LUTs for each weight that may have a palette.
        max_drop: how far the task's metric may fall without fine-tuning.
    """

    limit: int | None = None
    bits_per_weight: float | None = None
    max_drop: float | None = None

    def __str__(self) -> str:
        if self.limit is not None:
            return f"at most {self.limit:,} bytes"
        if self.bits_per_weight is not None:
            return f"{self.bits_per_weight:g} bits per weight"
        return f"a metric at most {self.max_drop:g} lower, without fine-tuning"


@dataclass(frozen=True)
class Question:
    """What `make_plan` is asked beside the recipe and the budget.

    Attributes:
        targets: that have to hold every setting, and whose artifacts are measured.
        settings: that layers choose from; without any, see `candidates`.
        pins: layers whose setting is given.
        method: how errors are found; without one, see `sensitivities`.
        examples: inputs of the training split to measure sensitivities on.
        file: of sensitivities; see `sensitivities_file`.
    """

    targets: Targets = ()
    settings: Sequence[Setting] = ()
    pins: Pins = ()
    method: Method | None = None
    examples: int = 128
    file: Path | None = None
    verbose: bool = False


def make_plan(
    recipe: Recipe, budget: Budget, question: Question, progress: Progress
) -> tuple[Plan, CompressionSpec]:
    """The best setting for every layer that the recipe's rules give a palette.

    Trains the float model first when the recipe says so.

    Raises:
        InvalidInput: when the recipe, a pin or the file of sensitivities is wrong, or nothing fits
            the budget.
        Unsupported: when a target cannot hold or express the model.
    """
    if budget.max_drop is not None and recipe.task is None:
        raise InvalidInput("a budget of the metric needs a recipe with a task")
    method, file = question.method, question.file
    known = read_sensitivities(file, method) if file else None
    # what is wrong should show before the training, so shapes come from a model without weights
    blank = build_module(recipe.model.factory, recipe.model.arguments)
    layers = candidates(
        blank, recipe.compression, question.settings, question.pins, question.targets
    )
    del blank
    if all(layer.settings == (None,) for layer in layers):
        raise InvalidInput(_NO_PALETTE)
    model, task, fp32 = float_model(recipe, progress)
    calibration, words = _calibration(recipe, model, task, question.examples)

    found = sensitivities(calibration, layers, method, file, known, progress)
    planner = _Planner(recipe, calibration, layers, found, question, progress)
    if budget.limit is not None:
        chosen, sizes = planner.within(budget.limit)
    else:
        if budget.bits_per_weight is not None:
            chosen = planner.at_rate(budget.bits_per_weight)
        else:
            assert budget.max_drop is not None
            assert task is not None
            assert fp32 is not None
            chosen = planner.with_metric(task, fp32, budget.max_drop)
        sizes = planner.sizes(chosen)
    spec = planner.spec(chosen)
    if all(rule.skip for rule in spec.rules):
        raise InvalidInput(_NO_PALETTE)
    return planner.describe(chosen, sizes, budget, f"{found.origin} on {words}"), spec


class _Planner:
    """Knows what layers can choose from and what it costs."""

    def __init__(
        self,
        recipe: Recipe,
        calibration: Calibration,
        layers: Sequence[Candidate],
        found: Sensitivities,
        question: Question,
        progress: Progress,
    ) -> None:
        self._recipe, self._calibration, self._layers = recipe, calibration, layers
        self._source: ModelSource = recipe.source()
        self._found, self._question, self._progress = found, question, progress
        self._options = [
            Options(
                [layer.nbytes(setting) for setting in layer.settings],
                [found.error(layer, setting) for setting in layer.settings],
            )
            for layer in layers
        ]
        self._front = front(self._options)

    def spec(self, chosen: Allocation) -> CompressionSpec:
        """As a recipe has it."""
        settings = {
            layer.name: layer.settings[choice]
            for layer, choice in zip(self._layers, chosen.choices, strict=True)
        }
        return spec_of(settings, self._layers, self._recipe.compression)

    def sizes(self, chosen: Allocation) -> dict[str, int]:
        """Bytes of the artifacts, by target."""
        mock = mock_up(self._calibration.model, self._source, self.spec(chosen))
        return artifact_bytes(mock, self._question.targets, verbose=self._question.verbose)

    def within(self, limit: int) -> tuple[Allocation, Mapping[str, int]]:
        """The best plan whose artifacts have at most ``limit`` bytes, and their sizes."""
        targets, numbers = self._question.targets, count(1)

        def measure(chosen: Allocation) -> dict[str, int]:
            self._progress("mock-up of the artifacts", next(numbers), MOST_MEASUREMENTS)
            return self.sizes(chosen)

        together = Costs.of(self._layers, self._options, targets)
        if len(targets) == 1:
            each = {targets[0][0].target: together}
        else:
            each = {
                target[0].target: Costs.of(self._layers, self._options, [target])
                for target in targets
            }
        fitted = fit(together, each, limit, self._dense_bytes(), measure)
        return fitted.allocation, fitted.sizes

    def _dense_bytes(self) -> int:
        """Of what no plan changes: biases, norms, other layers."""
        planned = {name for layer in self._layers for name in layer.names}
        state = self._calibration.model.state_dict().items()
        return sum(tensor.nbytes for name, tensor in state if name not in planned)

    def at_rate(self, bits_per_weight: float) -> Allocation:
        """The best plan with so many bits for each weight of its layers."""
        # layers that a pin or the user keeps dense do not count
        dense = [layer for layer in self._layers if layer.settings == (None,)]
        kept = sum(layer.nbytes(None) for layer in dense)
        weights = sum(layer.size for layer in self._layers) - kept // 4
        # no weight takes more than 32 bits
        room = kept + int(min(bits_per_weight, 32) * weights / 8)
        chosen = Costs.of(self._layers, self._options, ()).allocate(room)
        if chosen is None:
            smallest = ceil(8000 * (self._front[0].cost - kept) / weights) / 1000
            raise InvalidInput(
                f"{bits_per_weight:g} bits per weight are too few: the smallest settings take "
                f"{smallest:.3f}"
            )
        return chosen

    def with_metric(self, task: Task, fp32: float, max_drop: float) -> Allocation:
        """The smallest plan of the front whose metric is at most ``max_drop`` below ``fp32``.

        Found by bisection, as if the metric rose with the bytes.
        """
        points = self._front
        low, high = 0, len(points) - 1
        rounds = 1 + high.bit_length()
        for done in range(1, rounds + 1):
            middle = high if done == 1 else (low + high) // 2
            metric = self._metric(points[middle], task)
            self._progress(f"metric {metric:.2f} of {fp32:.2f}", done, rounds)
            if fp32 - metric <= max_drop:
                high = middle
            elif done == 1:
                raise InvalidInput(
                    f"no plan keeps the metric within {max_drop:g} of {fp32:.2f}: the best "
                    f"settings reach {metric:.2f} without fine-tuning"
                )
            else:
                low = middle + 1
            if low >= high:
                break
        return points[high]

    def describe(
        self, chosen: Allocation, sizes: Mapping[str, int], budget: Budget, words: str
    ) -> Plan:
        """All that is known of the plan."""
        payload = sum(x.costs[i] for x, i in zip(self._options, chosen.choices, strict=True))
        unused = 0 if budget.limit is None else budget.limit - max(sizes.values())
        planned = []
        for layer, choice in zip(self._layers, chosen.choices, strict=True):
            setting = layer.settings[choice]
            planned.append(
                PlannedLayer(
                    name=layer.name,
                    kind=layer.kind,
                    shape=layer.shape,
                    bits=setting.bits if setting else None,
                    dim=setting.dim if setting else 1,
                    groups=setting.groups if setting else 1,
                    bytes=layer.nbytes(setting),
                    error=self._found.error(layer, setting),
                )
            )
        return Plan(
            model=self._source.name,
            calibration=words,
            budget=str(budget),
            limit=budget.limit,
            bytes=dict(sizes),
            error=chosen.error,
            bound=lower_bound(self._options, payload + unused),
            layers=tuple(planned),
            front=tuple(Point(bytes=x.cost, error=x.error) for x in self._some_of_the_front()),
            uniform=tuple(self._uniform()),
        )

    def _metric(self, chosen: Allocation, task: Task) -> float:
        model, spec = deepcopy(self._calibration.model), self.spec(chosen)
        if not all(rule.skip for rule in spec.rules):
            prepare(
                model,
                spec,
                self._recipe.dkm,
                seed=self._recipe.seed,
                sensitivity=self._calibration.importance,
            )
        return evaluate(model.eval(), task)

    def _some_of_the_front(self) -> list[Allocation]:
        every = -(-len(self._front) // _MOST_POINTS)
        return self._front[::-every][::-1]

    def _uniform(self) -> Iterator[Point]:
        """What recipes with one rule would come to, whose small layers have bits of their own."""
        spec = self._recipe.compression
        small = Setting(spec.small_layer_bits)
        for setting in dict.fromkeys(x for layer in self._layers for x in layer.settings if x):
            if setting.groups > 1:
                continue
            choices: list[Setting | None] = []
            for layer in self._layers:
                is_small = layer.size < spec.small_layer_size
                own = small if is_small else setting
                if own in layer.settings:
                    choices.append(own)
                elif is_small and palette_size(Layout(layer.shape), small.bits) >= 2 * layer.size:
                    choices.append(None)  # as `dkm compress` does
            if len(choices) == len(self._layers) and any(choices):
                pairs = list(zip(self._layers, choices, strict=True))
                yield Point(
                    name=str(setting),
                    bytes=sum(layer.nbytes(choice) for layer, choice in pairs),
                    error=sum(self._found.error(layer, choice) for layer, choice in pairs),
                )


def _calibration(
    recipe: Recipe, model: nn.Module, task: Task | None, examples: int
) -> tuple[Calibration, str]:
    """What sensitivities are measured on, also in words."""
    if task is None:
        generator = torch.Generator().manual_seed(recipe.seed)
        inputs = [tuple(x.random(generator) for x in recipe.model.inputs) for _ in range(_BATCHES)]
        words = f"{_BATCHES} random inputs: the recipe has no task"
    else:
        count = min(_BATCHES, examples)
        batches = batches_of(task, "train", examples // count, recipe.seed)
        inputs = [batch for batch, _ in islice(batches, count)]
        words = f"{sum(len(batch[0]) for batch in inputs)} examples of the training split"
    scales = scales_of(model, inputs)
    about = recipe.source().model_dump_json(exclude={"name", "outputs"})
    divergence = _divergence_of(task) if task else _relative_error_of(scales)
    importance = importance_of(recipe, model, task)
    calibration = Calibration(model, inputs, divergence, scales, recipe.seed, about, importance)
    return calibration, words


def _divergence_of(task: Task) -> Divergence:
    def divergence(outputs: Outputs, references: Outputs) -> Tensor:
        return distillation_of(task, outputs[0], references[0], _TEMPERATURE)

    return divergence


def _relative_error_of(scales: Sequence[float]) -> Divergence:
    """Squared, of all outputs, relative to their variance."""

    def relative_error(outputs: Outputs, references: Outputs) -> Tensor:
        terms = [
            ((ours - theirs) / scale).square().mean()
            for ours, theirs, scale in zip(outputs, references, scales, strict=True)
            if theirs.is_floating_point()
        ]
        return torch.stack(terms).sum()

    return relative_error
