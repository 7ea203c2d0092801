"""Small networks and a way to palettize them, for tests of every layer of the project."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dkm_export.compress import finalize, prepare
from dkm_export.folding import fold_before_training
from dkm_export.palettized import BatchNorm, InputSpec, ModelSource, PalettizedModel
from dkm_export.references import build_module
from dkm_export.spec import CompressionSpec, LayerRule

IMAGE = (InputSpec(name="image", shape=(1, 3, 16, 16)),)
ROW = (InputSpec(name="x", shape=(1, 48)),)
TOKENS = (InputSpec(name="tokens", shape=(1, 12), dtype="int32", high=96),)

CASES = {
    "narrow": (
        "convolutions",
        IMAGE,
        (
            LayerRule(pattern="stem.*", bits=1, dim=2),
            LayerRule(pattern="depthwise.*", bits=2, dim=4),
            LayerRule(pattern="up.*", bits=3, dim=3, groups=2),
            LayerRule(pattern="line.*", bits=4, dim=4),
            LayerRule(pattern="head.*", bits=5, dim=5),
        ),
    ),
    "wide": (
        "convolutions",
        IMAGE,
        (
            LayerRule(pattern="stem.*", bits=6, dim=2, axis=1),
            LayerRule(pattern="depthwise.*", bits=7, groups=2),
            LayerRule(pattern="up.*", bits=8),
            LayerRule(pattern="line.*", bits=6, dim=2, axis=1, groups=3),
            LayerRule(pattern="head.*", bits=1, dim=8),
        ),
    ),
    "tokens": (
        "tokens",
        TOKENS,
        (
            LayerRule(pattern="embedding.*", bits=4, dim=4, axis=1),
            LayerRule(pattern="hidden.*", bits=3, dim=5, axis=1, groups=4),
            LayerRule(pattern="head.*", bits=2, dim=7),
        ),
    ),
}
"""Layouts of all sorts on the layers of a factory here: its name, what goes in, rules."""


class Convolutions(nn.Module):
    """Conv2d, depthwise, Conv1d, ConvTranspose2d and Linear, with batch norms in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU())
        self.depthwise = nn.Conv2d(48, 96, 3, padding=1, groups=48, bias=False)
        self.norm = nn.BatchNorm2d(96)
        self.up = nn.ConvTranspose2d(96, 24, 2, stride=2)
        self.up_norm = nn.BatchNorm2d(24)
        self.line = nn.Conv1d(24, 48, 3, padding=1)
        self.head = nn.Linear(48, 24)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.depthwise(self.stem(image))))
        x = torch.relu(self.up_norm(self.up(x)))
        x = torch.relu(self.line(x.mean(3)))
        y: Tensor = self.head(x.mean(2))
        return y


class Tokens(nn.Module):
    """Embedding, Linear and LayerNorm over integer ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 48)
        self.norm = nn.LayerNorm(48)
        self.hidden = nn.Linear(48, 96)
        self.head = nn.Linear(96, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        x = nn.functional.gelu(self.hidden(x))
        y: Tensor = self.head(x.mean(1))
        return y


class Tied(nn.Module):
    """An embedding whose weight is the head's too, and a layer that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 48)
        self.hidden = nn.Linear(48, 48)
        self.again = self.hidden
        self.head = nn.Linear(48, 96, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.hidden(self.embedding(tokens)))
        y: Tensor = self.head(torch.tanh(self.again(x)))
        return y


class Arithmetic(nn.Module):
    """A layer between operators that take numbers, such as hand-written activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x * 2 - 1) + 3
        z: Tensor = y * torch.relu(y) / 6
        return z


class Unused(nn.Module):
    """A layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y


class HalfLine(nn.Linear):
    """A bfloat16 layer that takes and gives float32."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).float()


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give ``module`` weights and batch norm statistics that outputs depend on visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                assert part.running_mean is not None
                assert part.running_var is not None
                part.running_mean.normal_(0, 0.2, generator=generator)
                part.running_var.uniform_(0.5, 2, generator=generator)
                part.weight.uniform_(0.5, 1.5, generator=generator)
                part.bias.normal_(0, 0.3, generator=generator)
                continue
            for parameter in part.parameters(recurse=False):
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 50
                parameter.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    return module.eval()


def convolutions() -> nn.Module:
    return lively(Convolutions())


def arithmetic() -> nn.Module:
    return lively(Arithmetic())


def unused() -> nn.Module:
    return lively(Unused())


def tokens() -> nn.Module:
    return lively(Tokens())


def tied() -> nn.Module:
    return lively(Tied())


def untied() -> nn.Module:
    """`tied` before its weights are: how a factory that leaves that to the training makes it."""
    module = Tied()
    module.head = nn.Linear(48, 96, bias=False)
    module.again = nn.Linear(48, 48)
    return lively(module)


def palettize(
    factory: str,
    inputs: tuple[InputSpec, ...],
    *rules: LayerRule,
    small_layer_size: int = 0,
    batch_norm: BatchNorm = "separate",
) -> PalettizedModel:
    """Post-training palettization of a factory's model."""
    module = build_module(factory, {})
    spec = CompressionSpec(rules=rules, small_layer_size=small_layer_size)
    name = factory.rpartition(":")[2]
    source = ModelSource(name=name, factory=factory, inputs=inputs, batch_norm=batch_norm)
    if batch_norm == "fold-before-training":
        fold_before_training(module, source.example_inputs())
    prepare(module, spec)
    return finalize(module, source)
