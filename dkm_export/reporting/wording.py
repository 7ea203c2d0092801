"""Sentences that a report has in every format."""

from __future__ import annotations

from collections.abc import Sequence

from dkm_export.checking.report import Report
from dkm_export.planning.result import Plan
from dkm_export.reporting.axes import signed, size
from dkm_export.reporting.content import Content
from dkm_export.reporting.tables import change, metric
from dkm_export.reporting.weights import Distribution
from dkm_export.training.metrics import Metrics


def lede(content: Content) -> str:
    """What became of the model, in two sentences."""
    smaller = (
        f"{size(content.fp32_bytes)} of float32 weights are a checkpoint of "
        f"{size(content.checkpoint_bytes)}: {compared(content.ratio, ' times')}."
    )
    if content.fp32 is None or content.hard is None:
        return smaller
    return (
        f"{smaller} {content.metric_name}: {metric(content.fp32)} before palettizing, "
        f"{metric(content.hard)} after ({change(content)})."
    )


def weights_line(weights: Distribution) -> str:
    """What is known of a palette beside its figure."""
    parts = [
        f"{weights.used:,} of {weights.total:,} centroids used",
        f"{weights.entropy:.2f} of {bits(weights.bits)} of information per index",
    ]
    if weights.dim > 1:
        parts.append(f"{weights.dim} weights share an index")
    return "; ".join(parts)


def compared(ratio: float, times: str) -> str:
    """``15.2x smaller``, or larger: the graph of a small network may outweigh it."""
    if 0 < ratio < 1:
        return f"{1 / ratio:.1f}{times} larger"
    return f"{ratio:.1f}{times} smaller"


def bits(count: int) -> str:
    """``1 bit``, ``4 bits``."""
    return "1 bit" if count == 1 else f"{count} bits"


def accuracy_lines(metrics: Metrics) -> list[str]:
    """What the metric of an epoch is, and how far soft and hard ended apart."""
    if not metrics.epochs:
        return ["The run had no epochs of DKM training."]
    gap = signed(metrics.epochs[-1].gap, "+.2f")
    return [
        "On the task's test split. Hard weights are what artifacts hold.",
        f"After the last epoch, soft minus hard is {gap}.",
    ]


def front_lines(plan: Plan) -> list[str]:
    """What the numbers of a plan are."""
    return [
        f"Errors of layers are {plan.calibration}; of plans they are sums, which nothing measured. "
        f"The budget was {plan.budget}.",
        "Bytes of palettes and of weights that could have one; a file has more.",
        "No plan of these settings with as many bytes for palettes has an error below "
        f"{plan.bound:.3g}.",
    ]


def follows_line(plan: Plan, deviations: Sequence[str]) -> str:
    """Whether the checkpoint is what was planned."""
    if not deviations:
        return "Every planned layer of the checkpoint has the setting of the plan."
    return (
        f"{len(deviations)} of {len(plan.layers)} planned layers have another setting in the "
        "checkpoint."
    )


def fidelity_lines(check: Report) -> list[str]:
    """What was compared, and where."""
    return [
        "Each runtime against PyTorch on the same palettized weights: the largest relative L2 "
        "error of an output, beside the limit of its numeric class.",
        f"Checked on {check.machine}.",
    ]


COUNTED = (
    "A checkpoint holds centroids and indices, not the float weights from before: this is how many "
    "weights each centroid stands for."
)
