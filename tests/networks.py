"""The families of networks that people export, small: each as a factory, with what goes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkm_export.compress import finalize, prepare
from dkm_export.folding import fold_before_training
from dkm_export.palettized import BatchNorm, InputSpec, ModelSource, PalettizedModel
from dkm_export.spec import CompressionSpec, LayerRule
from dkm_models.bert import sentence_encoder, text_classifier
from dkm_models.mobilenet import mobilenet_v1_random, mobilenet_v2
from dkm_models.resnet import resnet18, resnet50
from tests.zoo import lively


class SqueezeExcite(nn.Module):
    """Channels weighed by what they are on average."""

    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, 4, 1)
        self.expand = nn.Conv2d(4, channels, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        weight = self.expand(torch.relu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        y: Tensor = x * self.gate(weight)
        return y


class InvertedResidual(nn.Module):
    """The unit of MobileNet-v3 and EfficientNet."""

    def __init__(self, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(8, 24, 1, bias=False),
            nn.BatchNorm2d(24),
            activation,
            nn.Conv2d(24, 24, 5, padding=2, groups=24, bias=False),
            nn.BatchNorm2d(24),
            activation,
            SqueezeExcite(24, gate),
            nn.Conv2d(24, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y


def mobile(activation: nn.Module, gate: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        activation,
        InvertedResidual(activation, gate),
        InvertedResidual(activation, gate),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


class UNet(nn.Module):
    """Down twice and up again, by a transposed convolution and by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 16, 3, padding=1)
        self.bottom = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 2, 2)
        self.third = nn.Conv2d(32, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        first = F.relu(self.first(image))
        second = F.relu(self.second(F.max_pool2d(first, 2, 2)))
        bottom = F.leaky_relu(self.bottom(F.avg_pool2d(second, 2, 2)), 0.2)
        third = F.elu(self.third(torch.cat([self.up(bottom), second], 1)))
        wide = F.interpolate(third, scale_factor=2, mode="bilinear", align_corners=False)
        y: Tensor = self.last(torch.cat([wide, first], 1)).sigmoid()
        return y + F.interpolate(y[:, :, ::2, ::2], scale_factor=2, mode="nearest")


class ViT(nn.Module):
    """Patches and a class token through layers of torch's own transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.positions = nn.Parameter(torch.randn(1, 17, 32))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                32, 4, 64, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x[:, 0])
        return y


class Recurrent(nn.Module):
    """A recurrent layer over embedded tokens."""

    def __init__(self, layer: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.layer = layer
        width = layer.hidden_size * (2 if layer.bidirectional else 1)
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        sequence, state = self.layer(self.embedding(tokens))
        last = state[1] if isinstance(state, tuple) else state
        y: Tensor = self.head(sequence)
        return y, last


BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
}
DISTILBERT = {
    "model_type": "distilbert",
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 64,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "dropout": 0.1,
}


@dataclass(frozen=True)
class Family:
    """A network in eval mode, with weights that let its outputs depend on its inputs.

    Attributes:
        make: its factory.
        inputs: what goes in.
        outputs: their names, as many as the network has.
        batch_norms: whether it has some.
        slow: whether converting it takes long.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...] = ("output",)
    batch_norms: bool = False
    slow: bool = False


def _image(size: int) -> tuple[InputSpec, ...]:
    return (InputSpec(name="image", shape=(1, 3, size, size)),)


TEXT = (
    InputSpec(name="tokens", shape=(2, 8), dtype="int32", high=64),
    InputSpec(name="mask", shape=(2, 8), dtype="int32", high=2),
)
TOKENS = (InputSpec(name="tokens", shape=(2, 7), dtype="int32", high=20),)


def make(name: str) -> nn.Module:
    """The factory of a family, for a source of a model."""
    return FAMILIES[name].make()


FAMILIES = {
    "resnet18": Family(lambda: lively(resnet18(10)), _image(32), batch_norms=True, slow=True),
    "resnet50": Family(lambda: lively(resnet50(10)), _image(32), batch_norms=True, slow=True),
    "mobilenet_v1": Family(mobilenet_v1_random, _image(32), batch_norms=True, slow=True),
    "mobilenet_v2": Family(
        lambda: lively(mobilenet_v2(10)), _image(32), batch_norms=True, slow=True
    ),
    "mobilenet_v3": Family(
        lambda: lively(mobile(nn.Hardswish(), nn.Hardsigmoid())), _image(16), batch_norms=True
    ),
    "efficientnet": Family(
        lambda: lively(mobile(nn.SiLU(), nn.Sigmoid())), _image(16), batch_norms=True
    ),
    "distilbert": Family(lambda: lively(text_classifier(DISTILBERT, 3)), TEXT),
    "minilm": Family(lambda: lively(sentence_encoder(BERT)), TEXT),
    "unet": Family(lambda: lively(UNet()), _image(16)),
    "vit": Family(lambda: lively(ViT()), _image(32)),
    "lstm": Family(
        lambda: lively(Recurrent(nn.LSTM(12, 8, batch_first=True))), TOKENS, ("sequence", "last")
    ),
    "gru": Family(
        lambda: lively(Recurrent(nn.GRU(12, 8, batch_first=True))), TOKENS, ("sequence", "last")
    ),
}


def palettized(name: str, bits: int, batch_norm: BatchNorm = "separate") -> PalettizedModel:
    """A family's network with all its layers palettized, without training."""
    family = FAMILIES[name]
    source = ModelSource(
        name=name,
        factory="tests.networks:make",
        arguments={"name": name},
        inputs=family.inputs,
        outputs=family.outputs,
        batch_norm=batch_norm,
    )
    module = family.make()
    if batch_norm == "fold-before-training":
        fold_before_training(module, source.example_inputs())
    prepare(module, CompressionSpec(rules=(LayerRule(bits=bits),), small_layer_size=0))
    return finalize(module, source)
