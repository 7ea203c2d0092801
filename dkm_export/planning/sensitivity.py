"""How much worse a model gets when one layer becomes a palette: measured or predicted.

The divergence from the float model's outputs is at its minimum, so a small change ``d`` of a weight
increases it by about ``d H d / 2``. The curvature is ``H = J h J``, with the derivatives ``J`` of
the outputs by the weight and the curvature ``h`` of the divergence by the outputs, which is that of
a few directions: ``H = E[g g]`` for ``g = J w`` and random ``w`` with ``E[w w] = h``. ``d`` is
exact: the layer is clustered. Two estimates of ``H`` are taken and the larger one counts: with the
sampled gradients as they are, which knows how errors of weights add up, but from few samples; and
with their mean squares alone, the diagonal.

Sources: Kim et al., "SqueezeLLM", arXiv 2306.07629, section 4.1, and Hassibi and Stork, "Second
Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS 1992, for the estimate; there
``g`` are gradients of the loss, which vanish where a model is its own teacher. For ``J h J``:
Martens, "New Insights and Perspectives on the Natural Gradient Method", arXiv 1412.1193, section 8.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dkm_export.clustering import nearest, quick_centroids
from dkm_export.errors import InvalidInput
from dkm_export.parametrization import rounded, vectors_of
from dkm_export.planning.candidates import Candidate, Setting
from dkm_export.task import user_code

Progress = Callable[[str, int, int], None]

Outputs = tuple[Tensor, ...]
Divergence = Callable[[Outputs, Outputs], Tensor]
"""Of a model's outputs from those of the float model: a scalar that is least where they agree."""

_MOST_SAMPLES = 128
_MOST_BYTES = 1 << 29
"""Of the gradients that are kept, two bytes for each weight and sample."""

_STEP = 0.1
"""How far outputs are pushed to find ``h``, relative to their standard deviation."""

_CHUNK = 1 << 20
"""Weights whose gradients are widened at once."""

_MOST_OPERATIONS = 3e12
"""In layers, to measure all errors once: some minutes."""

_CLUSTERINGS = 3
"""Of vectors, whose centroids depend on where they start: errors of one differ by a third."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the sensitivities are measured on.

    Attributes:
        model: in float, in eval mode.
        inputs: batches of the model's inputs.
        divergence: of the outputs.
        scales: of each output, see `scales_of`.
        seed: of random directions and centroids.
        about: what else decides the outputs and the divergence, as text.
        importance: how much each weight counts for its centroids, when the recipe says so.
    """

    model: nn.Module
    inputs: Sequence[tuple[Tensor, ...]]
    divergence: Divergence
    scales: Sequence[float]
    seed: int
    about: str = ""
    importance: Mapping[str, Tensor] | None = None

    def outputs(self) -> list[Outputs]:
        """Of the model, for all inputs."""
        with torch.no_grad():
            return [outputs_of(self.model, inputs) for inputs in self.inputs]

    def palettized(
        self, layer: Candidate, settings: Sequence[Setting]
    ) -> Iterator[tuple[Setting, Tensor]]:
        """The layer's weight at each setting, after k-means without training, as float32."""
        weight = self.model.get_parameter(layer.name).detach().float()
        importance = None if self.importance is None else self.importance.get(layer.name)
        for (dim, groups), bits in _families(settings).items():
            layout = layer.layout(Setting(bits[0], dim, groups))
            vectors = vectors_of(weight, layout)
            counts = None if importance is None else vectors_of(importance, layout).sum(-1)
            tables = quick_centroids(vectors, [1 << count for count in bits], self.seed, counts)
            for count, centroids in zip(bits, tables, strict=True):
                lut = rounded(centroids, layer.rule.lut).float()
                indices = nearest(vectors, lut)
                found = torch.stack([one[which] for one, which in zip(lut, indices, strict=True)])
                yield Setting(count, dim, groups), layout.from_vectors(found)

    def measure(self, weights: Mapping[str, Tensor], references: Sequence[Outputs]) -> float:
        """The divergence from ``references`` with other weights in some layers, over all inputs."""
        total = 0.0
        with _replaced(self.model, weights):
            found = self.outputs()
        for ours, theirs in zip(found, references, strict=True):
            # as a task's own losses expect it: something that can be differentiated
            leaves = tuple(x.requires_grad_(x.is_floating_point()) for x in ours)
            total += self.divergence(leaves, theirs).item()
        return total / len(self.inputs)


def divergence_of_a_push(calibration: Calibration) -> float:
    """How far outputs get that are pushed at random: tells one model or divergence from another."""
    with torch.no_grad():
        outputs = outputs_of(calibration.model, calibration.inputs[0])
    generator = torch.Generator().manual_seed(calibration.seed)
    return _push(calibration, outputs, generator)[2].item()


def outputs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Outputs:
    """Of a model, always as a tuple.

    Raises:
        InvalidInput: when the model fails.
    """
    with user_code("the model on the inputs that sensitivities are measured on"):
        result = model(*inputs)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def scales_of(model: nn.Module, inputs: Sequence[tuple[Tensor, ...]]) -> list[float]:
    """The standard deviation of each output over all inputs; 1 where it never changes.

    Raises:
        InvalidInput: when the model fails, or no output is a floating-point number.
    """
    sums = []
    with torch.no_grad():
        for batch in inputs:
            outputs = [output.double() for output in outputs_of(model, batch)]
            sums.append([(x.numel(), x.sum().item(), x.square().sum().item()) for x in outputs])
        if not any(output.is_floating_point() for output in outputs_of(model, inputs[0])):
            raise InvalidInput("no output of the model is a floating-point number to be compared")
    scales = []
    for output in zip(*sums, strict=True):
        count, total, squares = (sum(column) for column in zip(*output, strict=True))
        scales.append(max(0.0, squares / count - (total / count) ** 2) ** 0.5 or 1.0)
    return scales


@dataclass(frozen=True, eq=False)
class Gradients:
    """Of one layer.

    Attributes:
        samples: bfloat16 ``[samples, weights]``.
        squares: their mean squares, float32 ``[weights]``.
    """

    samples: Tensor
    squares: Tensor

    @classmethod
    def of(cls, count: int, weights: int) -> Self:
        """Nothing yet."""
        return cls(torch.zeros(count, weights, dtype=torch.bfloat16), torch.zeros(weights))

    def keep(self, index: int, gradient: Tensor) -> None:
        """Take the sample ``index``."""
        self.samples[index] = gradient
        self.squares.addcmul_(gradient, gradient, value=1 / len(self.samples))

    def increases(self, changes: Tensor) -> list[float]:
        """The larger estimate of ``change H change / 2``, for changes ``[changes, weights]``."""
        along = torch.zeros(len(self.samples), len(changes), dtype=torch.float64)
        for part, rows in zip(changes.split(_CHUNK, 1), self.samples.split(_CHUNK, 1), strict=True):
            along += rows.float() @ part.T
        together = along.square().mean(0) / 2
        alone = torch.stack([(self.squares * change.square()).sum() / 2 for change in changes])
        return torch.maximum(together, alone.double()).tolist()


def can_be_measured(calibration: Calibration, layers: Sequence[Candidate]) -> bool:
    """Whether that takes few operations: it knows more than gradients, with few bits above all."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs_of(calibration.model, calibration.inputs[0])
    operations: int = counter.get_total_flops()
    passes = len(calibration.inputs) * sum(len(layer.settings) for layer in layers)
    return operations * passes <= _MOST_OPERATIONS


def predicted_errors(
    calibration: Calibration,
    wanted: Sequence[tuple[Candidate, Sequence[Setting]]],
    progress: Progress,
) -> dict[tuple[str, Setting], float]:
    """The increase that gradients predict, by layer and setting.

    Several layers are clustered at a time, one on each core.
    """
    layers = [layer for layer, settings in wanted if settings]
    # as many whatever is wanted, so that errors do not depend on what a file has already
    size = sum(layer.size for layer, _ in wanted)
    samples = max(4, min(_MOST_SAMPLES, _MOST_BYTES // (2 * size)))
    gradients = sample_gradients(calibration, layers, samples, progress)

    def predict(pair: tuple[Candidate, Sequence[Setting]]) -> dict[tuple[str, Setting], float]:
        layer, settings = pair
        weight = calibration.model.get_parameter(layer.name).detach().float()
        found = dict(calibration.palettized(layer, settings))
        changes = torch.stack([(changed - weight).flatten() for changed in found.values()])
        increases = gradients[layer.name].increases(changes)
        return {(layer.name, setting): x for setting, x in zip(found, increases, strict=True)}

    # those that take longest first, so that no core waits at the end
    jobs = [(layer, family) for layer, settings in wanted for family in _split(settings)]
    jobs.sort(key=lambda job: -sum(job[0].layout(x).vectors << x.bits for x in job[1]))
    errors: dict[tuple[str, Setting], float] = {}
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        for done, (job, found) in enumerate(zip(jobs, pool.map(predict, jobs), strict=True), 1):
            errors |= found
            progress(f"clustering {job[0].name}", done, len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C
        torch.set_num_threads(threads)  # of threads to come, which would have one
    return errors


def measured_errors(
    calibration: Calibration,
    wanted: Sequence[tuple[Candidate, Sequence[Setting]]],
    progress: Progress,
) -> dict[tuple[str, Setting], float]:
    """The increase with that layer alone palettized, by layer and setting.

    Of vectors it is the mean of a few clusterings: `dkm compress` will find yet another one.
    """
    references = calibration.outputs()
    base = calibration.measure({}, references)
    jobs = [
        (layer, replace(calibration, seed=calibration.seed + attempt), some)
        for layer, settings in wanted
        for attempt in range(_CLUSTERINGS)
        if (some := [setting for setting in settings if attempt == 0 or setting.dim > 1])
    ]
    done, total = 0, sum(len(settings) for _, _, settings in jobs)
    found: dict[tuple[str, Setting], list[float]] = {}
    for layer, attempt, settings in jobs:
        for setting, weight in attempt.palettized(layer, settings):
            changed = calibration.measure({layer.name: weight}, references)
            found.setdefault((layer.name, setting), []).append(changed - base)
            done += 1
            progress(f"measuring {layer.name} at {setting}", done, total)
    # in this order NaN stays
    return {key: max(fmean(increases), 0.0) for key, increases in found.items()}


def sample_gradients(
    calibration: Calibration, layers: Sequence[Candidate], count: int, progress: Progress
) -> dict[str, Gradients]:
    """Gradients of the outputs in ``count`` random directions, by layer.

    Raises:
        InvalidInput: when the model or the divergence cannot be differentiated.
    """
    parameters = [calibration.model.get_parameter(layer.name) for layer in layers]
    kept = [Gradients.of(count, parameter.numel()) for parameter in parameters]
    generator = torch.Generator().manual_seed(calibration.seed)
    asked = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for sample in range(count):
            inputs = calibration.inputs[sample % len(calibration.inputs)]
            outputs = outputs_of(calibration.model, inputs)
            directions = _directions(calibration, outputs, generator)
            found = torch.autograd.grad(
                [output for output, _ in directions],
                parameters,
                [direction for _, direction in directions],
                allow_unused=True,
            )
            for gradients, gradient in zip(kept, found, strict=True):
                if gradient is not None:
                    gradients.keep(sample, gradient.flatten())
            progress("gradients", sample + 1, count)
    finally:
        for parameter, before in zip(parameters, asked, strict=True):
            parameter.requires_grad_(before)
    return {layer.name: gradients for layer, gradients in zip(layers, kept, strict=True)}


def _directions(
    calibration: Calibration, outputs: Outputs, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Outputs that count, with a ``w`` for each of their examples, so that ``E[w w]`` is ``h``.

    A small push ``z`` of the outputs changes the gradient of the divergence by ``h z``. Of that
    direction, ``w`` has the length whose square is ``z h z``: its mean is the trace of ``h``.
    """
    noise, leaves, divergence = _push(calibration, outputs, generator)
    wanted = [index for index, leaf in enumerate(leaves) if leaf.requires_grad]
    slopes = torch.autograd.grad(divergence, [leaves[x] for x in wanted], allow_unused=True)
    found = []
    for index, slope in zip(wanted, slopes, strict=True):
        if slope is None:
            continue
        if not outputs[index].requires_grad:
            raise InvalidInput(
                "the model's outputs cannot be differentiated by its weights: use --measure"
            )
        # in double: where a model is sure, slopes are tiny, and their squares no float32
        change = -slope.double().reshape(len(slope), -1) / (_STEP * calibration.scales[index])
        square = (change * noise[index].reshape(len(slope), -1)).sum(1, keepdim=True).clamp(min=0)
        length = change.norm(dim=1, keepdim=True).clamp(min=1e-150)
        direction = (change * square.sqrt() / length).reshape(outputs[index].shape)
        found.append((outputs[index], direction.to(outputs[index].dtype)))
    return found


def _push(
    calibration: Calibration, outputs: Outputs, generator: torch.Generator
) -> tuple[list[Tensor], Outputs, Tensor]:
    """Noise, the outputs as leaves, and their divergence from outputs with that noise."""
    noise, pushed = [], []
    for output, scale in zip(outputs, calibration.scales, strict=True):
        noise.append(torch.randn(output.shape, generator=generator))
        moved = output.detach() + _STEP * scale * noise[-1]
        pushed.append(moved if output.is_floating_point() else output)
    leaves = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in outputs)
    return noise, leaves, calibration.divergence(leaves, tuple(pushed))


def _families(settings: Sequence[Setting]) -> dict[tuple[int, int], list[int]]:
    """Bits of the settings by their dim and groups."""
    families: dict[tuple[int, int], list[int]] = {}
    for setting in settings:
        families.setdefault((setting.dim, setting.groups), []).append(setting.bits)
    return families


def _split(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Settings that are clustered together."""
    return [
        [Setting(count, dim, groups) for count in bits]
        for (dim, groups), bits in _families(settings).items()
    ]


@contextmanager
def _replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    parameters = {name: model.get_parameter(name) for name in weights}
    kept = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, weight in weights.items():
            parameters[name].data = weight.to(kept[name].dtype)
        yield
    finally:
        for name, weight in kept.items():
            parameters[name].data = weight
