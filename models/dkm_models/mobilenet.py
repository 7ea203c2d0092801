"""MobileNet-v1 and v2 in plain torch.

Source: Howard et al., 2017, arXiv 1704.04861, table 1; Sandler et al., 2018, arXiv 1801.04381,
table 2. Published weights load: parameters have the names of github.com/marvis/pytorch-mobilenet
in v1, which has none from its authors in PyTorch, and torchvision's in v2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BLOCKS_V1 = (
    # output channels, stride of the depthwise convolution
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


_STAGES_V2 = (
    # expansion, output channels, blocks, stride of the first
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV1(nn.Module):
    """``[batch, 3, size, size]`` images to ``[batch, classes]`` logits; 4,231,976 parameters."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        blocks = [nn.Sequential(*_unit(3, 32, 3, nn.ReLU(), stride=2))]
        channels = 32
        for output, stride in _BLOCKS_V1:
            depthwise = _unit(channels, channels, 3, nn.ReLU(), stride, groups=channels)
            blocks.append(nn.Sequential(*depthwise, *_unit(channels, output, 1, nn.ReLU())))
            channels = output
        self.model = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, classes)

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.model(image)
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


class MobileNetV2(nn.Module):
    """``[batch, 3, size, size]`` images to ``[batch, classes]`` logits; 3,504,872 parameters."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Sequential(*_unit(3, 32, 3, nn.ReLU6(), stride=2))]
        channels = 32
        for expansion, output, count, stride in _STAGES_V2:
            for number in range(count):
                blocks.append(
                    InvertedResidual(channels, output, expansion, 1 if number else stride)
                )
                channels = output
        blocks.append(nn.Sequential(*_unit(channels, 1280, 1, nn.ReLU6())))
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.features(image)
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


class InvertedResidual(nn.Module):
    """A depthwise convolution between two of 1x1, and a shortcut where input and output agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        units = [nn.Sequential(*_unit(inputs, width, 1, nn.ReLU6()))] if expansion > 1 else []
        units.append(nn.Sequential(*_unit(width, width, 3, nn.ReLU6(), stride, groups=width)))
        project = nn.Conv2d(width, outputs, 1, bias=False)
        self.conv = nn.Sequential(*units, project, nn.BatchNorm2d(outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        residual: Tensor = self.conv(features)
        return features + residual if self.shortcut else residual


def mobilenet_v1(classes: int = 1000) -> MobileNetV1:
    """MobileNet-v1 at width 1.0 with torch's default initialisation, to load weights into."""
    return MobileNetV1(classes)


def mobilenet_v2(classes: int = 1000) -> MobileNetV2:
    """MobileNet-v2 at width 1.0 with torch's default initialisation, to load weights into."""
    return MobileNetV2(classes)


def mobilenet_v1_random(classes: int = 1000, seed: int = 0) -> MobileNetV1:
    """MobileNet-v1 with random weights that behave like trained ones.

    torch's default initialisation gives logits that hardly depend on the image, which no parity
    check can tell from wrong ones. Here signals keep their scale through the network, and batch
    norms hold random parameters and the statistics of random images.
    """
    generator = torch.Generator().manual_seed(seed)
    model = MobileNetV1(classes)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
                module.momentum = None  # the plain average over all batches: here, of one
        model.fc.bias.normal_(0, 0.1, generator=generator)
        model.train()(torch.randn(16, 3, 96, 96, generator=generator))
    return model.eval()


def _unit(
    inputs: int, outputs: int, kernel: int, activation: nn.Module, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, ...]:
    padding = kernel // 2
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(outputs), activation
