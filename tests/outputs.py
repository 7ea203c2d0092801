"""Small networks whose outputs, names or dtypes are out of the ordinary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dkm_models.digits import digits_cnn
from tests.zoo import HalfLine, lively


class Brackets(nn.Module):
    """Layers whose names are patterns; two outputs of different size, and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"[ab]*": nn.Linear(48, 96), "?": nn.Linear(96, 48)})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.tanh(self.parts["[ab]*"](x))
        z = self.parts["?"](y)
        return 1000 * z, y, z.argmax(1, keepdim=True)


class Number(nn.Module):
    """One number per example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(48, 96), nn.Linear(96, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.layer(x)))
        return y


class Score(nn.Module):
    """A number per example, without an axis for it."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(48, 96), nn.Linear(96, 1)
        self.register_buffer("shift", torch.full((1,), 0.5).expand(96))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.layer(x)) + self.shift).squeeze(1)
        return y


class Half(nn.Module):
    """A bfloat16 layer between others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.low = nn.Linear(48, 64), HalfLine(64, 96)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.low(torch.tanh(self.layer(x)))
        return y


class Integers(nn.Module):
    """No output that could be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 96)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y.argmax(1, keepdim=True)


class Cut(nn.Module):
    """An output that no weight gets a gradient from."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 96)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y.detach()


class DigitsTwice(nn.Module):
    """The network of the digits, with squares as a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.network = digits_cnn()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.network(image)
        return logits, logits.square()


def digits_twice() -> nn.Module:
    return DigitsTwice()


def brackets() -> nn.Module:
    return lively(Brackets())


def number() -> nn.Module:
    return lively(Number())


def score() -> nn.Module:
    return lively(Score())


def little_ties() -> nn.Module:
    """A tied weight that 4 bits leave dense, as its LUT would be too large."""
    one, other, last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 96)
    other.weight = one.weight
    return lively(nn.Sequential(one, nn.Tanh(), other, nn.Tanh(), last))


def half() -> nn.Module:
    return lively(Half())
