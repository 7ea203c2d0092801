"""``samples.safetensors``: inputs, and the PyTorch reference's outputs for them.

They travel with the artifacts, so that an app's own tests can check on the device what
``dkm check`` checks here. Tensors: ``input.<name>`` and ``output.<name>``, ``[samples, *shape]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dkm_export.errors import InvalidInput
from dkm_export.palettized import ModelDescription, ModelSource
from dkm_export.task import Task, batches_of, user_code

COUNT = 8
_SEED = 0
_COMPARABLE = (torch.float32, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs by name and outputs in order, each ``[samples, *shape]``."""

    inputs: Mapping[str, Tensor]
    outputs: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.outputs[0])

    def input(self, index: int) -> dict[str, Tensor]:
        """The inputs of one sample, with the shapes that the model takes."""
        return {name: stacked[index] for name, stacked in self.inputs.items()}


def make_samples(module: nn.Module, source: ModelSource, task: Task | None) -> Samples:
    """Run the reference on `COUNT` samples: of the task's test split, or random without a task.

    Raises:
        InvalidInput: when the model does not run on them or returns something else than
            ``source.outputs`` says.
    """
    if task is None:
        generator = torch.Generator().manual_seed(_SEED)
        batches = [tuple(spec.random(generator) for spec in source.inputs) for _ in range(COUNT)]
    else:
        batches = [inputs for inputs, _ in islice(fixed_batches(task, source), COUNT)]
    outputs = [run_reference(module, inputs, source) for inputs in batches]
    names = [spec.name for spec in source.inputs]
    return Samples(
        dict(zip(names, map(torch.stack, zip(*batches, strict=True)), strict=True)),
        [torch.stack(stacked) for stacked in zip(*outputs, strict=True)],
    )


def fixed_batches(
    task: Task, source: ModelDescription
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """The test split in batches of exactly the artifact's batch size.

    The targets of the last batch may be fewer than its inputs, which are then repeated to fill it.

    Raises:
        InvalidInput: when the task's inputs are not what ``source.inputs`` says.
    """
    size = source.inputs[0].shape[0]
    for inputs, target in batches_of(task, "test", size):
        repeats = -(-size // max(1, len(target)))
        full = tuple(torch.cat([tensor] * repeats)[:size] for tensor in inputs)
        if len(full) != len(source.inputs):
            raise InvalidInput(
                f"task '{type(task).__name__}' gives {len(full)} inputs, the model has "
                f"{', '.join(spec.name for spec in source.inputs)}"
            )
        for spec, tensor in zip(source.inputs, full, strict=True):
            if problem := spec.problem(tensor):
                raise InvalidInput(f"task '{type(task).__name__}': {problem}")
        yield full, target


def run_reference(
    module: nn.Module, inputs: tuple[Tensor, ...], source: ModelDescription
) -> tuple[Tensor, ...]:
    """The module's outputs as a tuple, as many as ``source.outputs`` names.

    Raises:
        InvalidInput: when the model fails, or returns another number or kind of outputs, or
            values that are not finite and so cannot be compared.
    """
    shapes = [list(tensor.shape) for tensor in inputs]
    with user_code(f"model '{source.factory}' on inputs {shapes}"), torch.no_grad():
        result = module(*inputs)
    outputs = (result,) if isinstance(result, Tensor) else result
    if (
        not isinstance(outputs, tuple | list)
        or len(outputs) != len(source.outputs)
        or not all(isinstance(output, Tensor) and output.dim() for output in outputs)
    ):
        raise InvalidInput(
            f"model '{source.factory}' has to return {', '.join(source.outputs)}: one tensor with "
            "a batch axis for each name, and a tuple for several"
        )
    for output in outputs:
        if output.dtype not in _COMPARABLE:
            raise InvalidInput(
                f"model '{source.factory}' returns {output.dtype}, which targets do not: "
                f"choose from {', '.join(map(str, _COMPARABLE))}"
            )
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise InvalidInput(f"model '{source.factory}' returns NaN or infinity on inputs {shapes}")
    return tuple(outputs)


def save_samples(samples: Samples, source: ModelSource, path: Path) -> None:
    """Write the samples; the same samples give the same bytes."""
    inputs = {f"input.{name}": tensor for name, tensor in samples.inputs.items()}
    outputs = zip(source.outputs, samples.outputs, strict=True)
    named = inputs | {f"output.{name}": tensor for name, tensor in outputs}
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in named.items()}))


def load_samples(path: Path, source: ModelSource) -> Samples:
    """Read samples and validate them against the source.

    Raises:
        InvalidInput: when the file is missing, malformed, or does not fit ``source``.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{path}: {error}: export again") from error
    try:
        inputs = {spec.name: tensors[f"input.{spec.name}"] for spec in source.inputs}
        outputs = [tensors[f"output.{name}"] for name in source.outputs]
    except KeyError as error:
        raise InvalidInput(f"{path}: tensor {error} is missing: export again") from error
    fits = all(
        tuple(inputs[spec.name].shape[1:]) == spec.shape
        and str(inputs[spec.name].dtype) == f"torch.{spec.dtype}"
        for spec in source.inputs
    ) and all(output.dtype in _COMPARABLE for output in outputs)
    tensors_read = (*inputs.values(), *outputs)
    counts = {len(tensor) if tensor.dim() else 0 for tensor in tensors_read}
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors_read)
    if not fits or not finite or len(counts) != 1 or counts == {0}:
        raise InvalidInput(
            f"{path}: the samples do not fit the checkpoint's model or are not finite: export again"
        )
    return Samples(inputs, outputs)
