"""MobileNet-v1 in plain torch (Howard et al., 2017, arXiv 1704.04861, table 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BLOCKS = (
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


class MobileNetV1(nn.Module):
    """``[batch, 3, size, size]`` images to ``[batch, classes]`` logits; 4,231,976 parameters."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers = [_unit(3, 32, kernel=3, stride=2)]
        channels = 32
        for output, stride in _BLOCKS:
            layers.append(_unit(channels, channels, kernel=3, stride=stride, groups=channels))
            layers.append(_unit(channels, output, kernel=1))
            channels = output
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.features(image)
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


def mobilenet_v1(classes: int = 1000) -> MobileNetV1:
    """MobileNet-v1 at width 1.0 with torch's default initialisation, to load weights into."""
    return MobileNetV1(classes)


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
        model.classifier.bias.normal_(0, 0.1, generator=generator)
        model.train()(torch.randn(16, 3, 96, 96, generator=generator))
    return model.eval()


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
