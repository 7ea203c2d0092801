"""Handwritten digits: scikit-learn's real 8x8 images, which its package carries, and a network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from dkm_export.errors import Unsupported
from dkm_export.plugins import missing_packages
from dkm_export.task import Batch, Split
from dkm_models.classification import Classification

_TEST_SHARE = 0.2
_SPLIT_SEED = 0


class DigitsCNN(nn.Module):
    """``[batch, 1, 8, 8]`` images in 0..1 to ``[batch, 10]`` logits.

    It has each kind of layer that palettes treat differently: plain, depthwise and pointwise
    convolutions, batch norm, a large and a small linear layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(128, 128, 3, padding=1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.hidden = nn.Linear(512, 256)
        self.classifier = nn.Linear(256, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.features(image).flatten(1)
        x = torch.relu(self.hidden(x))
        logits: Tensor = self.classifier(x)
        return logits


def digits_cnn() -> DigitsCNN:
    """The network of the demo, untrained."""
    return DigitsCNN()


class Digits(Classification):
    """1,797 images of handwritten digits; a fixed, stratified 20 % of them is the test split."""

    def size(self, split: Split) -> int:
        return len(self._splits[split][1])

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        images, labels = self._splits[split]
        order = torch.arange(len(labels))
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(labels), generator=generator)
        for chosen in order.split(batch_size):
            yield (images[chosen],), labels[chosen]

    @cached_property
    def _splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        missing = missing_packages(("sklearn",), "models")
        if missing:
            raise Unsupported(f"the digits task: {missing}")
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        data = load_digits()
        images = torch.from_numpy(data.images / 16).float().unsqueeze(1)
        labels = torch.from_numpy(data.target).long()
        train, test = train_test_split(
            torch.arange(len(labels)).numpy(),
            test_size=_TEST_SHARE,
            random_state=_SPLIT_SEED,
            stratify=data.target,
        )
        return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
