"""What the ways to compute DKM share: coordinates in which rounding does least harm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

UNATTENDED = 1e-30
"""A centroid with less attention than this stays where it is."""


class Frame(NamedTuple):
    """Coordinates of one group: attention is the same in all, but numbers near 0 round least.

    Attributes:
        origin: float64 ``[dim]``, what weights and centroids count from.
        unit: a power of two, in whose steps they count.
        tau: temperature divided by ``unit^2``.
    """

    origin: Tensor
    unit: float
    tau: float

    def scale(self, farthest: float, dtype: torch.dtype) -> float:
        """``2 / tau``, or what ``dtype`` can still tell apart.

        Logits are multiples of eps times the largest of them: with a lower temperature, of more
        than 1.

        Args:
            farthest: largest magnitude of a coordinate.
            dtype: of the logits.
        """
        return min(2 / self.tau, 1 / (torch.finfo(dtype).eps * max(farthest, 1e-12) ** 2))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32, whatever the training around asks for.

    Logits are differences of large products, of which bfloat16 or TF32 leave nothing.
    """
    backends = (
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    )
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
