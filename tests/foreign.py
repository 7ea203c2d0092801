"""A small network, and what tools other than this one make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dkm_export.exporting import StoredTensor
from dkm_export.inspection import Inspection


class Net(nn.Module):
    """A convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.hidden = nn.Linear(32, 64)
        self.head = nn.Linear(64, 32)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.conv(image)).mean((2, 3))
        y: Tensor = self.head(torch.relu(self.hidden(x)))
        return y


IMAGE = (1, 3, 16, 16)


def network() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network, always the same, and an input."""
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(IMAGE),)


def to_onnx(path: Path, **options: Any) -> Path:
    """The network as torch itself exports it."""
    model, inputs = network()
    torch.onnx.export(model, inputs, path, dynamo=True, verbose=False, **options)
    return path


def named(found: Inspection) -> dict[str, StoredTensor]:
    """All tensors by name."""
    return {tensor.name: tensor for tensor in found.description.tensors}


def encodings(found: Inspection) -> dict[str, tuple[object, ...]]:
    """Of the layers: encoding, bits, dim, groups."""
    return {x.name: (x.encoding, x.bits, x.dim, x.groups) for x in found.layers}
