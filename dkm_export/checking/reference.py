"""PyTorch's side of every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dkm_export.errors import InvalidInput
from dkm_export.palettized import PalettizedModel
from dkm_export.references import load_task
from dkm_export.samples import Samples, fixed_batches, run_reference
from dkm_export.task import Task

Outputs = Sequence[npt.NDArray[Any]]
"""The model's outputs in order, each stacked over samples."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What the hard-assigned model computes in PyTorch.

    Attributes:
        model: the checkpoint.
        samples: inputs and outputs that were exported with the artifacts.
        outputs: what the checkpoint computes for the samples' inputs now.
        control: the same, with one LUT entry of ``control_layer`` changed.
        control_layer: name of that layer's parameter.
        task: the task, or None.
        test_outputs: the first output over the task's test split, or None.
        metrics: the task's metric: ``fp32`` as recorded, ``hard`` measured now.
    """

    model: PalettizedModel
    samples: Samples
    outputs: Outputs
    control: Outputs
    control_layer: str
    task: Task | None
    test_outputs: npt.NDArray[Any] | None
    metrics: dict[str, float]


def make_reference(model: PalettizedModel, samples: Samples) -> Reference:
    """Run PyTorch on the samples and on the task's test split.

    Raises:
        InvalidInput: when the model's factory or task does not import or does not fit.
    """
    module = model.build()
    task = load_task(model.source.task) if model.source.task else None
    metrics, test_outputs = dict(model.metrics), None
    if task:
        batches = list(fixed_batches(task, model.source))
        rows = [run_reference(module, x, model.source)[0][: len(y)] for x, y in batches]
        metrics["hard"] = task.metric(torch.cat(rows), torch.cat([y for _, y in batches]))
        test_outputs = torch.cat(rows).numpy()
    control_layer, perturbed = _perturb(model)
    return Reference(
        model=model,
        samples=samples,
        outputs=_run_samples(module, samples, model),
        control=_run_samples(perturbed.build(), samples, model),
        control_layer=control_layer,
        task=task,
        test_outputs=test_outputs,
        metrics=metrics,
    )


def _run_samples(module: torch.nn.Module, samples: Samples, model: PalettizedModel) -> Outputs:
    outputs = [
        run_reference(module, tuple(samples.input(index).values()), model.source)
        for index in range(len(samples))
    ]
    return [torch.stack(stacked).numpy() for stacked in zip(*outputs, strict=True)]


def _perturb(model: PalettizedModel) -> tuple[str, PalettizedModel]:
    """Change the LUT entry that stands for the largest share of its layer's weights."""
    if not model.palettes:
        raise InvalidInput("the checkpoint holds no palettes: there is nothing to check")
    used = {
        name: np.bincount(palette.indices.reshape(palette.layout.groups, -1)[0])
        for name, palette in model.palettes.items()
    }
    name = max(used, key=lambda name: float(used[name].max()) / model.palettes[name].indices.size)
    palette = model.palettes[name]
    lut = palette.lut.copy()
    lut[0, used[name].argmax()] += np.abs(lut).max() / 2
    return name, replace(model, palettes={**model.palettes, name: replace(palette, lut=lut)})
