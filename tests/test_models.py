from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dkm_models.digits import Digits, digits_cnn
from dkm_models.mobilenet import mobilenet_v1
from dkm_models.resnet import ResNet, resnet18, resnet50


def test_mobilenet_v1_is_the_paper_s() -> None:
    model = mobilenet_v1().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_231_976
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize(
    ("factory", "parameters", "entries"),
    [(resnet18, 11_689_512, 122), (resnet50, 25_557_032, 320)],
)
def test_resnets_are_torchvision_s(
    factory: Callable[[], ResNet], parameters: int, entries: int
) -> None:
    model = factory()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    state = model.state_dict()
    assert len(state) == entries
    assert {"conv1.weight", "layer1.0.bn2.running_var", "layer4.1.conv2.weight"} <= state.keys()
    assert {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.bias", "fc.bias"} <= state.keys()
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)


def test_digits_are_split_once_and_for_all() -> None:
    task = Digits()
    assert (task.size("train"), task.size("test")) == (1437, 360)
    (image,), label = next(task.batches("test", 360))
    assert label.bincount().min() >= 34
    assert (image.min().item(), image.max().item()) == (0, 1)
    shuffled = next(task.batches("test", 360, seed=1))[1]
    assert not torch.equal(shuffled, label)
    assert torch.equal(shuffled.sort().values, label.sort().values)
    assert digits_cnn().eval()(image).shape == (360, 10)
