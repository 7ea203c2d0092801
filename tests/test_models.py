from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dkm_export.errors import InvalidInput
from dkm_models.digits import Digits, digits_cnn
from dkm_models.mobilenet import (
    InvertedResidual,
    mobilenet_v1,
    mobilenet_v1_random,
    mobilenet_v2,
)
from dkm_models.resnet import resnet18, resnet50


@pytest.mark.parametrize(
    ("factory", "parameters", "digest", "names"),
    [
        (
            mobilenet_v1,
            4_231_976,
            "ee294b71f5bb13ce",
            ("model.0.0.weight", "model.0.1.running_var", "model.1.3.weight", "fc.weight"),
        ),
        (
            mobilenet_v2,
            3_504_872,
            "b37e2a9130e6341b",
            ("features.1.conv.0.0.weight", "features.17.conv.3.weight", "classifier.1.weight"),
        ),
        (
            resnet18,
            11_689_512,
            "867b8d8ae95f5a28",
            ("conv1.weight", "layer1.0.bn2.running_var", "layer4.1.conv2.weight", "fc.bias"),
        ),
        (
            resnet50,
            25_557_032,
            "2d5b8870b35e1530",
            ("layer2.0.downsample.0.weight", "layer2.0.downsample.1.bias", "layer4.2.bn3.bias"),
        ),
    ],
)
def test_published_weights_would_load(
    factory: Callable[[], nn.Module], parameters: int, digest: str, names: tuple[str, ...]
) -> None:
    """The digests are of torchvision 0.28's networks, v1's of marvis/pytorch-mobilenet's."""
    model = factory()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    state = model.state_dict()
    assert state.keys() >= set(names)
    lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (mobilenet_v1, (-267.2258, -35.2496, -96.7955)),
        (mobilenet_v2, (1.43, 0.1402, 1.8508)),
        (resnet18, (96.6417, 75.9874, -323.0581)),
        (resnet50, (-1325375.9, -2723395.2, -2509993.0)),
    ],
)
def test_networks_compute_what_the_published_ones_do(
    factory: Callable[[], nn.Module], expected: tuple[float, ...]
) -> None:
    """Logits of torchvision 0.28's networks, v1's of marvis' layers, with these numbers in them."""
    model, generator = factory().eval(), torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.dim() > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.uniform_(0.5, 2, generator=generator)  # large enough for ReLU6 to cut
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    logits = model(image)[0, :3]
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-3, atol=1e-2)


def test_mobilenet_v2_adds_what_it_can() -> None:
    model = mobilenet_v2(10).eval()
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    channels = (32, 16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320, 1280)
    sides = (16, 16, 8, 8, 4, 4, 4, *[2] * 7, *[1] * 5)
    for block, width, side in zip(model.features, channels, sides, strict=True):
        if isinstance(block, InvertedResidual):
            fits = image.shape[1:] == (width, side, side)
            expected = block.conv(image) + image if fits else block.conv(image)
            assert torch.equal(block(image), expected)
        image = block(image)
        assert image.shape == (1, width, side, side)
    dropout, linear = model.classifier
    assert isinstance(dropout, nn.Dropout)
    assert dropout.p == 0.2
    assert isinstance(linear, nn.Linear)


def test_random_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (mobilenet_v1_random(10, seed) for seed in (0, 0, 1))
    assert torch.equal(first.fc.weight, again.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)


def test_the_loss_and_the_metric_of_classes() -> None:
    output, target = torch.tensor([[2.0, 0, 0, 0], [1, 3, 0, 0], [5, 0, 0, 1]]), torch.arange(3)
    log_shares = output.log_softmax(1)
    plain, smooth = (Digits(label_smoothing=share).loss(output, target) for share in (0, 0.2))
    right = -log_shares[range(3), target].mean()
    torch.testing.assert_close(plain, right)
    torch.testing.assert_close(smooth, 0.8 * right - 0.2 * log_shares.mean())
    assert Digits().metric(output, target) == pytest.approx(200 / 3)
    assert torch.equal(Digits().loss(output, target), plain)
    with pytest.raises(InvalidInput, match=r"label_smoothing is -0.1, allowed: 0 to below 1"):
        Digits(label_smoothing=-0.1)


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
