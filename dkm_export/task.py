"""The contract of a task: data, loss and metric, whatever the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

from torch import Tensor

Split = Literal["train", "test"]
Batch = tuple[tuple[Tensor, ...], Tensor]
"""The model's inputs, each ``[batch, ...]``, and the targets ``[batch, ...]``."""


class Task(ABC):
    """What a model is trained for and measured by. A subclass takes no arguments.

    Attributes:
        metric_name: what `metric` returns, as printed: ``"top-1 %"``. Higher is better.
    """

    metric_name: ClassVar[str]

    @abstractmethod
    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """Go through a split once: in a fixed order, or shuffled (and augmented) by ``seed``."""

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The training loss of a batch, a scalar."""

    @abstractmethod
    def metric(self, output: Tensor, target: Tensor) -> float:
        """The metric over all outputs and targets of a split, concatenated."""
