"""ResNet-18 and ResNet-50 in plain torch (He et al., 2015, arXiv 1512.03385, table 1).

Parameters have torchvision's names, and the stride of a bottleneck is in its 3x3 convolution as
there, so that torchvision's weights load.
"""

from __future__ import annotations

from torch import Tensor, nn


class ResNet(nn.Module):
    """``[batch, 3, size, size]`` images to ``[batch, classes]`` logits.

    Args:
        block: the residual unit.
        depths: units in each of the four stages.
        classes: number of classes.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = _stage(block, 64, 64, depths[0], stride=1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, depths[1], stride=2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, depths[2], stride=2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, depths[3], stride=2)
        self.fc = nn.Linear(512 * block.expansion, classes)

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            features = stage(features)
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the unit of ResNet-18."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, features: Tensor) -> Tensor:
        residual = self.relu(self.bn1(self.conv1(features)))
        residual = self.bn2(self.conv2(residual))
        output: Tensor = self.relu(residual + self.downsample(features))
        return output


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, beside a shortcut; the unit of ResNet-50."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, features: Tensor) -> Tensor:
        residual = self.relu(self.bn1(self.conv1(features)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        output: Tensor = self.relu(residual + self.downsample(features))
        return output


def resnet18(classes: int = 1000) -> ResNet:
    """ResNet-18, 11,689,512 parameters, with torch's default initialisation."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes)


def resnet50(classes: int = 1000) -> ResNet:
    """ResNet-50, 25,557,032 parameters, with torch's default initialisation."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes)


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, width: int, depth: int, stride: int
) -> nn.Sequential:
    units: list[nn.Module] = [block(inputs, width, stride)]
    units += [block(width * block.expansion, width, 1) for _ in range(depth - 1)]
    return nn.Sequential(*units)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """What brings the input to the shape of the output; nothing where it has it already."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))
