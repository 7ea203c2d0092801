"""PyTorch's side of every comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

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

Changed = Literal["LUT entry", "index", "bias"]
"""What a negative control changes in one place of a layer."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What the hard-assigned model computes in PyTorch.

    Attributes:
        model: the checkpoint.
        samples: inputs and outputs that were exported with the artifacts.
        outputs: what the checkpoint computes for the samples' inputs now.
        controls: what it would compute for the first sample with something changed in one place,
            by what that is, and by parameter.
        task: the task, or None.
        test_outputs: the first output over the task's test split, or None.
        metrics: the task's metric: ``fp32`` as recorded, ``hard`` measured now.
    """

    model: PalettizedModel
    samples: Samples
    outputs: Outputs
    controls: Mapping[Changed, Mapping[str, Outputs]]
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
) -> dict[Changed, dict[str, Outputs]]:
    controls: dict[Changed, dict[str, Outputs]] = {"LUT entry": {}, "index": {}, "bias": {}}
    biases = {name for name, _ in module.named_parameters()}

    def control(changed: Changed, name: str, values: Tensor) -> None:
        parameter = module.get_parameter(name)
        right = parameter.data
        parameter.data = values
        controls[changed][name] = _run(module, model, [sample])
        parameter.data = right

    for name, palette in model.palettes.items():
        control("LUT entry", name, torch.from_numpy(_with_entry_changed(palette).dense()))
        control("index", name, torch.from_numpy(_with_index_changed(palette).dense()))
        bias = f"{name.rpartition('.')[0]}.bias"
        if bias in biases:
            values = module.get_parameter(bias).data.clone()
            values.view(-1)[0] += values.abs().max().clamp(min=0.1)
            control("bias", bias, values)
    return controls


def _with_index_changed(palette: Palette) -> Palette:
    """Let the first vector be the entry that is farthest from its own."""
    entries = palette.lut[0].astype(np.float32)
    indices = palette.indices.copy()
    distances = np.abs(entries - entries[indices.flat[0]]).sum(1)
    indices.flat[0] = distances.argmax()
    return replace(palette, indices=indices)


def _with_entry_changed(palette: Palette) -> Palette:
    """Move the entry that most weights use by half of the largest, towards zero.

    Away from zero it could leave the range of float16.
    """
    entry = np.bincount(palette.indices.reshape(palette.layout.groups, -1)[0]).argmax()
    lut = palette.lut.copy()
    step = np.abs(lut).max() / 2
    lut[0, entry] -= np.where(lut[0, entry] > 0, step, -step)
    return replace(palette, lut=lut)
