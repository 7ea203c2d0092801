"""Small networks of random structure, with random rules: each seed gives the same one."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkm_export.compress import finalize, prepare
from dkm_export.palettized import InputSpec, ModelSource, PalettizedModel
from dkm_export.spec import CompressionSpec, LayerRule
from tests.zoo import lively

_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.ReLU6)
_BITS = (1, 2, 3, 4, 6, 8)
"""That Core ML has too."""


class Block(nn.Module):
    """A convolution, a norm or none, and an activation; around all of it a shortcut or none."""

    def __init__(self, pick: random.Random, channels: int, out: int) -> None:
        super().__init__()
        kernel, stride = pick.choice((1, 3, 5)), pick.choice((1, 1, 2))
        groups = pick.choice([n for n in (1, 1, 2, channels) if channels % n == out % n == 0])
        self.shortcut = stride == 1 and out == channels and pick.random() < 0.6
        self.conv = nn.Conv2d(
            *(channels, out, kernel, stride),
            padding=kernel // 2 if self.shortcut or kernel == 5 else pick.choice((0, kernel // 2)),
            groups=groups,
            bias=pick.random() < 0.5,
        )
        self.norm = nn.BatchNorm2d(out) if pick.random() < 0.6 else nn.Identity()
        self.activation = pick.choice(_ACTIVATIONS)()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.norm(self.conv(x)))
        return x + y if self.shortcut else y


class ImageNetwork(nn.Module):
    """Blocks, pooled, and one or two linear layers."""

    def __init__(self, pick: random.Random) -> None:
        super().__init__()
        channels, blocks = 3, []
        for _ in range(pick.randint(2, 4)):
            out = channels if pick.random() < 0.3 else pick.choice((12, 16, 24))
            blocks.append(Block(pick, channels, out))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.hidden = nn.Linear(channels, 16) if pick.random() < 0.5 else None
        self.head = nn.Linear(16 if self.hidden else channels, pick.randint(2, 12))
        self.maximum = pick.random() < 0.4

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(image)
        x = x.amax((2, 3)) if self.maximum else x.mean((2, 3))
        if self.hidden is not None:
            x = torch.relu(self.hidden(x))
        y: Tensor = self.head(x)
        return y


class TokenNetwork(nn.Module):
    """An embedding, one or two transformer layers or feed-forward ones, and a head."""

    def __init__(self, pick: random.Random) -> None:
        super().__init__()
        width, self.heads = pick.choice(((16, 2), (24, 3), (32, 4)))
        self.embedding = nn.Embedding(96, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    **({"mix": nn.Linear(width, 3 * width)} if pick.random() < 0.7 else {}),
                    "up": nn.Linear(width, 2 * width),
                    "down": nn.Linear(2 * width, width, bias=pick.random() < 0.5),
                }
            )
            for _ in range(pick.randint(1, 2))
        )
        self.head = nn.Linear(width, pick.randint(2, 9))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            y = layer["norm"](x)
            if "mix" in layer:
                y = self._attend(layer["mix"](y))
            x = x + layer["down"](F.gelu(layer["up"](y)))
        z: Tensor = self.head(x.mean(1))
        return z

    def _attend(self, mixed: Tensor) -> Tensor:
        batch, length, width = mixed.shape
        parts = mixed.view(batch, length, 3, self.heads, width // 3 // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value)
        return y.transpose(1, 2).reshape(batch, length, width // 3)


def make(seed: int) -> nn.Module:
    """The network of a seed."""
    pick = random.Random(seed)
    return lively(TokenNetwork(pick) if seed % 3 == 0 else ImageNetwork(pick), seed)


def random_model(seed: int) -> PalettizedModel:
    """The network of a seed, each layer with a random number of bits, dim, axis and groups."""
    pick, module = random.Random(seed), make(seed)
    rules = []
    for name, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding) or weight is None:
            continue
        axis = pick.choice((0, 0, 1))
        dims = [dim for dim in (1, 1, 2, 4) if weight.shape[axis] % dim == 0]
        dim = pick.choice(dims)
        together = dim if axis == 0 else 1
        groups = pick.choice([n for n in (1, 1, 2) if weight.shape[0] % (n * together) == 0])
        rules.append(
            LayerRule(
                pattern=f"{name}.weight", bits=pick.choice(_BITS), dim=dim, axis=axis, groups=groups
            )
        )
    tokens = InputSpec(name="tokens", shape=(1, 10), dtype="int32", high=96)
    image = InputSpec(name="image", shape=(1, 3, 32, 32))
    source = ModelSource(
        name=f"random{seed}",
        factory="tests.random_networks:make",
        arguments={"seed": seed},
        inputs=(tokens if seed % 3 == 0 else image,),
    )
    prepare(module, CompressionSpec(rules=tuple(rules), small_layer_size=0))
    return finalize(module, source)
