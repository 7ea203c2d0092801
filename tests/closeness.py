"""How far numbers are from those of the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def relative_l2(actual: Any, expected: Any) -> float:
    """The length of the difference from ``expected`` in units of its own; arrays or tensors."""
    reference = torch.as_tensor(expected).detach().double().numpy()
    return float(np.linalg.norm(actual - reference) / np.linalg.norm(reference))
