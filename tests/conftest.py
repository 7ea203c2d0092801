from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """A training run switches them off for its process, which the next test should not inherit."""
    yield
    torch.set_flush_denormal(False)
