"""PyTorch's side of every comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dkm_export.errors import InvalidInput
from dkm_export.palette import Palette
from dkm_export.palettized import PalettizedModel
from dkm_export.samples import Samples, fixed_batches, run_reference
from dkm_export.task import Task, metric_of

Outputs = Sequence[npt.NDArray[Any]]
"""The model's outputs in order, each stacked over samples."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What the hard-assigned model computes in PyTorch.

    Attributes:
        model: the checkpoint.
        samples: inputs and outputs that were exported with the artifacts.
        outputs: what the checkpoint computes for the samples' inputs now.
        controls: by layer, what it would compute for the first sample with one LUT entry changed.
        task: the task, or None.
        test_outputs: the first output over the task's test split, or None.
        metrics: the task's metric: ``fp32`` as recorded, ``hard`` measured now.
    """

    model: PalettizedModel
    samples: Samples
    outputs: Outputs
    controls: Mapping[str, Outputs]
    task: Task | None
    test_outputs: npt.NDArray[Any] | None
    metrics: dict[str, float]


def make_reference(
    model: PalettizedModel, samples: Samples, data: Mapping[str, Any] | None
) -> Reference:
    """Run PyTorch on the samples and on the task's test split.

    Args:
        model: the checkpoint.
        samples: that travel with the artifacts.
        data: see `ModelSource.load_task`.

    Raises:
        InvalidInput: when the model's factory or task does not import or does not fit, or there
            are no palettes to check.
    """
    if not model.palettes:
        raise InvalidInput("the checkpoint holds no palettes: there is nothing to check")
    module = model.build()
    task = model.source.load_task(data)
    # the metric of the hard weights is measured here and now, or not reported
    metrics = {name: value for name, value in model.metrics.items() if name != "hard"}
    test_outputs = None
    if task:
        batches = list(fixed_batches(task, model.source))
        rows = [run_reference(module, x, model.source)[0][: len(y)] for x, y in batches]
        metrics["hard"] = metric_of(task, torch.cat(rows), torch.cat([y for _, y in batches]))
        test_outputs = torch.cat(rows).numpy()
    return Reference(
        model=model,
        samples=samples,
        outputs=_run(module, model, [samples.input(index) for index in range(len(samples))]),
        controls=_run_controls(module, model, samples.input(0)),
        task=task,
        test_outputs=test_outputs,
        metrics=metrics,
    )


def _run(
    module: nn.Module, model: PalettizedModel, samples: Sequence[Mapping[str, Tensor]]
) -> Outputs:
    outputs = [run_reference(module, tuple(sample.values()), model.source) for sample in samples]
    return [torch.stack(stacked).numpy() for stacked in zip(*outputs, strict=True)]


def _run_controls(
    module: nn.Module, model: PalettizedModel, sample: Mapping[str, Tensor]
) -> dict[str, Outputs]:
    controls = {}
    for name, palette in model.palettes.items():
        weight = module.get_parameter(name)
        right = weight.data
        weight.data = torch.from_numpy(_changed(palette).dense())
        controls[name] = _run(module, model, [sample])
        weight.data = right
    return controls


def _changed(palette: Palette) -> Palette:
    """Move the entry that most weights use by half of the largest, towards zero.

    Away from zero it could leave the range of float16.
    """
    entry = np.bincount(palette.indices.reshape(palette.layout.groups, -1)[0]).argmax()
    lut = palette.lut.copy()
    step = np.abs(lut).max() / 2
    lut[0, entry] -= np.where(lut[0, entry] > 0, step, -step)
    return replace(palette, lut=lut)
