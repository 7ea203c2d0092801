"""Weights that several layers share: one palette, trained and stored once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dkm_export.checkpoint import load_checkpoint, save_checkpoint
from dkm_export.compress import finalize, prepare
from dkm_export.errors import InvalidInput
from dkm_export.palettized import ModelSource, PalettizedModel
from dkm_export.parametrization import DkmWeight
from dkm_export.spec import CompressionSpec, LayerRule
from tests.zoo import TOKENS, tied

TIES = {"again.weight": "hidden.weight", "head.weight": "embedding.weight"}
SPEC = CompressionSpec(rules=(LayerRule(bits=3, dim=2),), small_layer_size=0)
Trained = tuple[nn.Module, PalettizedModel]
SOURCE = ModelSource(name="tied", factory="tests.zoo:tied", inputs=TOKENS)


def _two_layers() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    return model


def _one_layer_twice() -> nn.Module:
    layer = nn.Linear(32, 32)
    return nn.Sequential(layer, nn.Tanh(), layer)


@pytest.mark.parametrize("make", [_two_layers, _one_layer_twice])
def test_one_soft_weight_with_the_sum_of_the_gradients(make: Any) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(5, 32)
    biases = [model[0].bias, model[2].bias]
    prepare(model, SPEC)
    (dkm,) = {part for part in model.modules() if isinstance(part, DkmWeight)}
    names = [name for name, _ in model.named_parameters()]
    assert sum(name.endswith("weight.original") for name in names) == 1
    latent = model.get_parameter("0.parametrizations.weight.original")

    model.train()(x).square().sum().backward()
    assert dkm.steps == 1
    assert model[0].weight is model[2].weight
    found, latent.grad = latent.grad, None

    # The same with two leaves in the places where the shared weight is used.
    soft = model[0].weight
    first, second = (soft.detach().clone().requires_grad_() for _ in range(2))
    hidden = torch.tanh(nn.functional.linear(x, first, biases[0]))
    nn.functional.linear(hidden, second, biases[1]).square().sum().backward()
    assert first.grad is not None
    assert second.grad is not None
    soft.backward(first.grad + second.grad)
    assert found is not None
    assert latent.grad is not None
    torch.testing.assert_close(found, latent.grad)


@pytest.fixture(scope="module")
def trained() -> Trained:
    """A model in eval mode, and what finalize makes of it."""
    model = tied()
    prepare(model, SPEC)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    tokens = TOKENS[0].random(torch.Generator().manual_seed(0))
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(tokens).square().mean().backward()
        optimizer.step()
    return model.eval(), finalize(model, SOURCE)


def test_finalize_save_and_build(trained: Trained, tmp_path: Path) -> None:
    model, palettized = trained
    assert palettized.palettes.keys() == set(TIES.values())
    assert palettized.ties == TIES
    path = tmp_path / "model.dkm.safetensors"
    save_checkpoint(palettized, path)
    loaded = load_checkpoint(path)
    assert loaded.ties == TIES
    tokens = TOKENS[0].random(torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded.build()(tokens), model(tokens))


def test_build_ties_what_the_factory_does_not(trained: Trained) -> None:
    source = SOURCE.model_copy(update={"factory": "tests.zoo:untied"})
    model = replace(trained[1], source=source).build()
    assert model.get_parameter("head.weight") is model.get_parameter("embedding.weight")
    assert model.get_parameter("again.weight") is model.get_parameter("hidden.weight")


@pytest.mark.parametrize(
    ("ties", "message"),
    [
        ({"again.weight": "hidden.weight"}, None),
        ({**TIES, "head.weight": "norm.weight"}, "head.weight is tied to norm.weight, which is no"),
        ({**TIES, "hidden.bias": "hidden.weight"}, "hidden.bias is more than one of palette, "),
        ({**TIES, "hidden.weight": "hidden.weight"}, "hidden.weight is more than one of palette, "),
        ({"head.weight": "again.weight", "again.weight": "hidden.weight"}, "which is no palette"),
        ({"head.weight": 3}, "'ties.head.weight': Input should be a valid string"),
        (["head.weight"], "'ties': Input should be an object"),
    ],
)
def test_damaged_ties_are_named(
    trained: Trained, tmp_path: Path, ties: Any, message: str | None
) -> None:
    path = tmp_path / "model.dkm.safetensors"
    save_checkpoint(trained[1], path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["dkm"])
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.offset_keys()}
    save_file(tensors, path, {"dkm": json.dumps(header | {"ties": ties})})
    if message is None:
        with pytest.raises(InvalidInput, match=r"misses weights for head.weight"):
            load_checkpoint(path).build()
        return
    with pytest.raises(InvalidInput, match=message) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_layers_of_one_weight_have_one_rule() -> None:
    rules = (LayerRule(bits=2), LayerRule(pattern="head.*", bits=2, freeze=True))
    with pytest.raises(InvalidInput, match=r"embedding.weight and head.weight are one tied weight"):
        prepare(tied(), CompressionSpec(rules=rules, small_layer_size=0))
