"""What a run measured: ``metrics.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import FiniteFloat

from dkm_export.sizing import Account
from dkm_export.spec import Frozen
from dkm_export.validation import read_json, validated


class Epoch(Frozen):
    """What one epoch of DKM fine-tuning ended with.

    Attributes:
        loss: mean over the epoch's batches.
        soft: the task's metric with soft weights, as the training saw them.
        hard: the metric with hard weights, as the artifact will have them.
        gap: ``soft - hard``; when it stays large, ``tau_end`` is too high.
    """

    epoch: int
    tau: FiniteFloat
    loss: FiniteFloat
    soft: FiniteFloat
    hard: FiniteFloat
    gap: FiniteFloat


class Sizes(Frozen):
    """Bytes of the weights.

    Attributes:
        palettes: packed indices and float16 LUTs.
        dense: everything else, as it is stored.
        fp32: all weights and buffers before compression.
        account: all that is stored by its kind, beside the DKM paper's way to count it.
    """

    palettes: int
    dense: int
    fp32: int
    account: Account


class Metrics(Frozen):
    """``metrics.json``. The metrics are None for a model without a task."""

    schema_version: Literal[1] = 1
    seed: int
    metric: str | None
    fp32: float | None
    epochs: tuple[Epoch, ...]
    hard: float | None
    sizes: Sizes


def read_metrics(file: Path) -> Metrics:
    """Read and validate a ``metrics.json``.

    Raises:
        InvalidInput: when it is missing or malformed.
    """
    return validated(read_json(file, "give the folder of `dkm compress`"), Metrics, file)
