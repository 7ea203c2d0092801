"""What tasks with one right class among several have in common."""

from __future__ import annotations

from torch import Tensor, nn

from dkm_export.errors import InvalidInput
from dkm_export.task import Task


class Classification(Task):
    """Cross-entropy, and the share of inputs whose highest logit is the right one.

    Outputs are logits ``[batch, classes]``, targets int64 ``[batch]``.

    Args:
        label_smoothing: share of the target that is spread evenly over all classes, 0 to 1.

    Raises:
        InvalidInput: when it is not.
    """

    metric_name = "top-1 %"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing < 1:
            raise InvalidInput(f"label_smoothing is {label_smoothing!r}, allowed: 0 to below 1")
        self._label_smoothing = label_smoothing

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, label_smoothing=self._label_smoothing)

    def metric(self, output: Tensor, target: Tensor) -> float:
        return 100 * float((output.argmax(1) == target).double().mean())
