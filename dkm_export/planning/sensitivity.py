"""How much worse a model gets when one layer becomes a palette.

The divergence from the float model's outputs is at its minimum, so a small change ``d`` of a
weight increases it by ``d H d / 2``, with the curvature ``H = E[g g]`` of gradients ``g`` of the
outputs in random directions. ``d`` is exact: the layer is clustered. Two estimates of ``H`` are
taken and the larger one counts: with the sampled gradients as they are, which knows how errors of
weights add up, but from few samples; and with their mean squares alone, the diagonal.

Sources: Kim et al., "SqueezeLLM", arXiv 2306.07629, section 4.1, and Hassibi and Stork, "Second
Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS 1992, for the estimate; there
``g`` are gradients of the loss, which vanish where a model is its own teacher.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from dkm_export.clustering import nearest, quick_centroids
from dkm_export.parametrization import rounded, vectors_of
from dkm_export.planning.candidates import Candidate, Setting

Progress = Callable[[str, int, int], None]

Outputs = tuple[Tensor, ...]
Divergence = Callable[[Outputs, Outputs], Tensor]
"""Of a model's outputs from those of the float model: a scalar that is least where they agree."""

_MOST_SAMPLES = 32
_MOST_BYTES = 1 << 29
"""Of the gradients that are kept, two bytes for each weight and sample."""

_STEP = 0.1
"""How far outputs are pushed for a gradient, relative to their standard deviation."""

_CHUNK = 1 << 20
"""Weights whose gradients are widened at once."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the sensitivities are measured on.

    Attributes:
        model: in float, in eval mode.
        inputs: batches of the model's inputs.
        divergence: of the outputs.
        seed: of random directions and centroids.
        importance: how much each weight counts for its centroids, when the recipe says so.
    """

    model: nn.Module
    inputs: Sequence[tuple[Tensor, ...]]
    divergence: Divergence
    seed: int
    importance: Mapping[str, Tensor] | None = None

    def outputs(self, inputs: tuple[Tensor, ...]) -> Outputs:
        """Of the model, always as a tuple."""
        result = self.model(*inputs)
        return (result,) if isinstance(result, Tensor) else tuple(result)

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

    def measure(self, weights: Mapping[str, Tensor]) -> float:
        """The divergence with other weights in some layers, over all inputs."""
        total = 0.0
        with torch.no_grad():
            references = [self.outputs(inputs) for inputs in self.inputs]
            with _replaced(self.model, weights):
                found = [self.outputs(inputs) for inputs in self.inputs]
        for ours, theirs in zip(found, references, strict=True):
            # as a task's own losses expect it: something that can be differentiated
            leaves = tuple(x.requires_grad_(x.is_floating_point()) for x in ours)
            total += self.divergence(leaves, theirs).item()
        return total / len(self.inputs)


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


def predicted_errors(
    calibration: Calibration,
    wanted: Sequence[tuple[Candidate, Sequence[Setting]]],
    progress: Progress,
) -> dict[tuple[str, Setting], float]:
    """The increase that gradients predict, by layer and setting.

    Several layers are clustered at a time, one on each core.
    """
    layers = [layer for layer, settings in wanted if settings]
    gradients = sample_gradients(calibration, layers, progress)

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
    with ThreadPoolExecutor(os.cpu_count(), initializer=_one_thread) as pool:
        for done, (job, found) in enumerate(zip(jobs, pool.map(predict, jobs), strict=True), 1):
            errors |= found
            progress(f"clustering {job[0].name}", done, len(jobs))
    return errors


def measured_errors(
    calibration: Calibration,
    wanted: Sequence[tuple[Candidate, Sequence[Setting]]],
    progress: Progress,
) -> dict[tuple[str, Setting], float]:
    """The increase with that layer alone palettized, by layer and setting."""
    total, base = sum(len(settings) for _, settings in wanted), calibration.measure({})
    errors: dict[tuple[str, Setting], float] = {}
    for layer, settings in wanted:
        for setting, weight in calibration.palettized(layer, settings):
            changed = calibration.measure({layer.name: weight})
            errors[layer.name, setting] = max(0.0, changed - base)
            progress(f"measuring {layer.name} at {setting}", len(errors), total)
    return errors


def sample_gradients(
    calibration: Calibration, layers: Sequence[Candidate], progress: Progress
) -> dict[str, Gradients]:
    """Gradients of the divergence from outputs that are pushed in random directions, by layer."""
    parameters = [calibration.model.get_parameter(layer.name) for layer in layers]
    size = sum(parameter.numel() for parameter in parameters)
    count = max(4, min(_MOST_SAMPLES, _MOST_BYTES // max(1, 2 * size)))
    kept = [Gradients.of(count, parameter.numel()) for parameter in parameters]
    generator = torch.Generator().manual_seed(calibration.seed)
    frozen = [p for p in calibration.model.parameters() if not p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(True)
    for sample in range(count):
        inputs = calibration.inputs[sample % len(calibration.inputs)]
        outputs = calibration.outputs(inputs)
        pushed, length = [], 0.0
        for output in outputs:
            step = _STEP * output.detach().float().std(correction=0).clamp(min=1e-12)
            noise = torch.randn(output.shape, generator=generator).to(output.device)
            pushed.append(output.detach() + step * noise if output.is_floating_point() else output)
            length = max(length, float(step))
        loss = calibration.divergence(outputs, tuple(pushed)) / length
        # a mean over independent examples: its square is that of one, divided by their number
        loss = loss * len(inputs[0]) ** 0.5
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for gradients, gradient in zip(kept, found, strict=True):
            if gradient is not None:
                gradients.keep(sample, gradient.flatten())
        progress("gradients", sample + 1, count)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return {layer.name: gradients for layer, gradients in zip(layers, kept, strict=True)}


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
    kept = {name: model.get_parameter(name).detach().clone() for name in weights}
    try:
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
        yield
    finally:
        for name, weight in kept.items():
            model.get_parameter(name).copy_(weight)


def _one_thread() -> None:
    torch.set_num_threads(1)
