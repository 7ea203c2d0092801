"""The contract of a task: data, loss and metric, whatever the model.

A task is the user's code, so the functions here call it and say so when it fails.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dkm_export.errors import DkmError, InvalidInput

Split = Literal["train", "test"]
Batch = tuple[tuple[Tensor, ...], Tensor]
"""The model's inputs, each ``[batch, ...]``, and the targets ``[batch, ...]``."""


class Task(ABC):
    """What a model is trained for and measured by.

    A subclass takes its settings as keyword arguments, plain JSON values: paths of data, say.

    Attributes:
        metric_name: what `metric` returns, as printed: ``"top-1 %"``. Higher is better.
    """

    metric_name: str

    @abstractmethod
    def size(self, split: Split) -> int:
        """Number of examples in a split."""

    @abstractmethod
    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """Go through a split once: in a fixed order, or shuffled (and augmented) by ``seed``."""

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The training loss of a batch, a scalar."""

    @abstractmethod
    def metric(self, output: Tensor, target: Tensor) -> float:
        """The metric over all outputs and targets of a split, concatenated."""

    def distillation(self, output: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """The loss that makes a model's output like that of its uncompressed teacher, a scalar.

        For logits with the classes along axis 1; a task with other outputs has its own.

        Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531,
        section 2: the square of the temperature keeps the size of the gradients.
        """
        student, goal = (F.log_softmax(x / temperature, 1) for x in (output, teacher))
        divergence = F.kl_div(student, goal, reduction="none", log_target=True).sum(1).mean()
        return temperature**2 * divergence


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Turn whatever the user's code raises into one line that says whose it is.

    Raises:
        InvalidInput: for any exception that is not ours.
    """
    try:
        yield
    except DkmError:
        raise
    except (Exception, SystemExit) as error:
        summary = str(error).strip().partition("\n")[0]
        raise InvalidInput(f"{what} failed: {type(error).__name__}: {summary}") from error


def batches_of(
    task: Task, split: Split, batch_size: int, seed: int | None = None
) -> Iterator[Batch]:
    """`Task.batches`, with every batch checked.

    Raises:
        InvalidInput: when it fails, yields nothing, or something else than inputs and targets.
    """
    name = f"task '{type(task).__name__}': its '{split}' batches"
    empty = True
    with user_code(name):
        for batch in task.batches(split, batch_size, seed):
            match batch:
                case (tuple() as inputs, Tensor() as target) if all(
                    isinstance(tensor, Tensor) and tensor.dim() for tensor in (*inputs, target)
                ):
                    empty = False
                    yield batch
                case _:
                    raise InvalidInput(
                        f"{name} are not ((input, ...), target), all tensors with a batch axis"
                    )
    if empty:
        raise InvalidInput(f"{name} are none")


def size_of(task: Task, split: Split) -> int:
    """`Task.size`, as a positive number.

    Raises:
        InvalidInput: when it fails or returns anything else.
    """
    name = f"task '{type(task).__name__}': the size of its '{split}' split"
    with user_code(name):
        size = task.size(split)
    if not isinstance(size, int) or size < 1:
        raise InvalidInput(f"{name} is {size!r}, not a positive number")
    return size


def output_of(model: nn.Module, inputs: Sequence[Tensor], name: str = "the model") -> Tensor:
    """What a task is about: the model's output, the first of several.

    Raises:
        InvalidInput: when the model fails.
    """
    with user_code(name):
        outputs = model(*inputs)
        first: Tensor = outputs[0] if isinstance(outputs, tuple | list) else outputs
    return first


def loss_of(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """`Task.loss`, as a scalar that can be differentiated.

    Raises:
        InvalidInput: when it fails or returns anything else.
    """
    name = f"task '{type(task).__name__}': its loss"
    with user_code(name):
        loss = task.loss(output, target)
    return _differentiable(loss, name)


def distillation_of(task: Task, output: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`Task.distillation`, as a scalar that can be differentiated.

    Raises:
        InvalidInput: when it fails or returns anything else.
    """
    name = f"task '{type(task).__name__}': its distillation"
    with user_code(name):
        loss = task.distillation(output, teacher, temperature)
    return _differentiable(loss, name)


def metric_of(task: Task, output: Tensor, target: Tensor) -> float:
    """`Task.metric`, as a finite number.

    Raises:
        InvalidInput: when it fails or returns anything else.
    """
    name = f"task '{type(task).__name__}': its metric"
    with user_code(name):
        value = task.metric(output, target)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidInput(f"{name} is {value!r}, not a finite number")
    return float(value)


def _differentiable(loss: object, name: str) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        raise InvalidInput(f"{name} is not a scalar tensor that depends on trainable weights")
    return loss
