from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dkm_export.compress import (
    finalize,
    freeze,
    measure_sensitivity,
    prepare,
    set_temperature,
    soft_weights,
)
from dkm_export.errors import InvalidInput
from dkm_export.palette import Layout
from dkm_export.palettized import InputSpec, ModelSource
from dkm_export.parametrization import DkmSettings, DkmWeight
from dkm_export.spec import CompressionSpec, LayerKind, LayerRule
from dkm_export.training.recipe import Recipe
from dkm_export.training.stage import run_recipe
from tests.zoo import IMAGE, TOKENS, convolutions, tokens

SOURCE = ModelSource(name="convolutions", factory="tests.zoo:convolutions", inputs=IMAGE)


def _spec(bits: int, dim: int = 1) -> CompressionSpec:
    return CompressionSpec(rules=(LayerRule(bits=bits, dim=dim),), small_layer_size=0)


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("dim", [1, 2, 4, 8])
def test_finalized_model_is_the_prepared_one_in_eval_mode(bits: int, dim: int) -> None:
    for factory, inputs in ((convolutions, IMAGE), (tokens, TOKENS)):
        model, spec = factory(), _spec(bits=bits, dim=dim)
        layers = prepare(model, spec)
        name = factory.__name__
        source = ModelSource(name=name, factory=f"tests.zoo:{name}", inputs=inputs)
        palettized = finalize(model, source)
        assert palettized.palettes.keys() == {x.name for x in layers if x.bits is not None}
        sample = inputs[0].random(torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert torch.equal(palettized.build()(sample), model(sample))
        for palette in palettized.palettes.values():
            assert np.array_equal(palette.lut, palette.lut.astype(np.float32).astype(np.float16))


def test_every_weight_has_its_nearest_centroid() -> None:
    model, spec = convolutions(), _spec(bits=4)
    before = model.get_parameter("stem.0.weight").detach().clone()
    prepare(model, spec)
    palette = finalize(model, SOURCE).palettes["stem.0.weight"]
    lut = palette.lut.astype(np.float64).reshape(-1)
    error = np.abs(before.double().numpy() - palette.dense())
    best = np.abs(before.double().numpy()[..., None] - lut).min(-1)
    np.testing.assert_allclose(error, best, atol=1e-7)


def test_centroids_are_rounded_before_the_assignment() -> None:
    model = nn.Linear(32, 32)
    nn.init.constant_(model.weight, 1.5001)
    prepare(model, _spec(bits=1))
    (dkm,) = (part for part in model.modules() if isinstance(part, DkmWeight))
    # 1.0004 is 1 in float16: nearest before the rounding, but not after it
    dkm.centroids = torch.tensor([[[1.0004], [2.0]]])
    palette = finalize(model, SOURCE).palettes["weight"]
    assert palette.lut.ravel().tolist() == [1.0, 2.0]
    assert palette.indices.min() == 1


def test_training_moves_weights_and_centroids_and_keeps_the_model_s_code() -> None:
    model, spec = convolutions(), _spec(bits=2, dim=2)
    kinds = [type(part) for part in model.children()]
    prepare(model, spec)
    before = finalize(model, SOURCE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        sample = IMAGE[0].random(torch.Generator().manual_seed(0)).repeat(4, 1, 1, 1)
        loss = model.train()(sample).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = finalize(model.eval(), SOURCE)
    assert all(
        not np.array_equal(after.palettes[name].lut, palette.lut)
        for name, palette in before.palettes.items()
    )
    assert all(map(isinstance, model.children(), kinds))


def test_evaluation_with_soft_weights_changes_nothing() -> None:
    model, spec = convolutions(), _spec(bits=2)
    prepare(model, spec)
    model.eval()
    sample = IMAGE[0].random(torch.Generator().manual_seed(0))
    with torch.no_grad():
        hard = model(sample)
        with soft_weights(model):
            soft = model(sample)
        assert not torch.equal(soft, hard)
        assert torch.equal(model(sample), hard)


def test_padding_where_dim_does_not_divide() -> None:
    model = nn.Linear(33, 50)
    spec = _spec(bits=3, dim=4)
    prepare(model, spec)
    source = ModelSource(
        name="line",
        factory="torch.nn:Linear",
        arguments={"in_features": 33, "out_features": 50},
        inputs=(InputSpec(name="x", shape=(1, 33)),),
    )
    palettized = finalize(model, source)
    assert palettized.palettes["weight"].layout.padding == 2
    assert torch.equal(palettized.build().get_parameter("weight"), model.eval().weight)
    model.train()(torch.randn(2, 33)).sum().backward()


def test_absolute_temperature_is_taken_as_it_is() -> None:
    model = nn.Linear(32, 32)
    prepare(model, _spec(bits=2), DkmSettings(tau=0.25, tau_unit="absolute"))
    set_temperature(model, 0.125)
    (dkm,) = (part for part in model.modules() if isinstance(part, DkmWeight))
    assert dkm.tau.item() == 0.125


def test_a_constant_weight_survives_training() -> None:
    model = nn.Linear(64, 64)
    nn.init.constant_(model.weight, 0.5)
    prepare(model, _spec(bits=2))
    model.train()(torch.randn(2, 64)).sum().backward()
    gradients = dict(model.named_parameters())
    original = gradients["parametrizations.weight.original"].grad
    assert original is not None
    assert torch.isfinite(original).all()
    assert torch.equal(model.eval().weight, torch.full((64, 64), 0.5))


def test_weights_that_no_palette_can_hold() -> None:
    def model(value: float) -> nn.Module:
        layer = nn.Linear(32, 32)
        with torch.no_grad():
            layer.weight[0, 0] = value
        return nn.Sequential(layer)

    huge = model(1e6)
    prepare(huge, _spec(bits=4))
    with pytest.raises(InvalidInput, match=r"0.weight: centroids are not finite in float16"):
        finalize(huge, SOURCE)
    with pytest.raises(InvalidInput, match=r"0.weight: weights are not finite"):
        prepare(model(float("nan")), _spec(bits=4))


def _train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(x).float().square().mean().backward()
        optimizer.step()


def _lines() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))


def _seen(layer: nn.Module) -> Tensor:
    """The weight as the layer sees it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


@pytest.mark.parametrize("by_rule", [False, True])
def test_frozen_layers_keep_their_palettes_and_the_others_train(by_rule: bool) -> None:
    model = _lines()
    rules = (LayerRule(bits=2), LayerRule(pattern="0.*", bits=2, freeze=by_rule))
    prepare(model, CompressionSpec(rules=rules, small_layer_size=0))
    if not by_rule:
        with pytest.raises(InvalidInput, match=r"'1.\*' matches no layer, allowed: 0.weight, 2.we"):
            freeze(model, "1.*")
        freeze(model, "0.*")
    before = finalize(model, SOURCE).palettes
    hard = torch.from_numpy(before["0.weight"].dense())
    model.train()
    assert torch.equal(_seen(model[0]), hard)
    _train(model)
    assert model.get_parameter("0.parametrizations.weight.original").grad is None
    assert model[0].bias.grad is not None
    after = finalize(model, SOURCE).palettes
    assert before["0.weight"].difference(after["0.weight"]) is None
    assert before["2.weight"].difference(after["2.weight"]) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = _lines().to(dtype)
    prepare(model, _spec(bits=3))
    before = finalize(model, SOURCE).palettes
    _train(model)
    original = model.get_parameter("0.parametrizations.weight.original")
    assert original.grad is not None
    assert original.dtype == original.grad.dtype == _seen(model[0]).dtype == dtype
    source = ModelSource(name="lines", factory="tests.test_compress:_lines", inputs=IMAGE)
    palettized = finalize(model, source)
    built = palettized.build()
    for name, palette in palettized.palettes.items():
        assert palette.difference(before[name]) is not None
        assert torch.equal(built.get_parameter(name), torch.from_numpy(palette.dense()))
        hard = _seen(model.eval()[int(name[0])])
        assert torch.equal(hard, built.get_parameter(name).to(dtype))
    assert built.get_parameter("0.bias").dtype == torch.float32


def _clustered(weight: Tensor, layout: Layout, start: Tensor, tau: Tensor, steps: int) -> Tensor:
    """DKM with plain operators, in float64: what autograd differentiates is not ours."""
    trailing = weight.dim() - 1 - layout.axis
    padded = nn.functional.pad(weight, [0, 0] * trailing + [0, layout.padding])
    w, c = layout.to_vectors(padded), start
    for _ in range(steps):
        a = torch.softmax(-(w[:, :, None] - c[:, None]).square().sum(-1) / tau, -1)
        c = (a.transpose(1, 2) @ w) / a.sum(1)[..., None]
    weight = layout.from_vectors(a @ c)
    return weight


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        (nn.Linear(32, 48), LayerRule(bits=2, groups=3)),
        (nn.Linear(32, 48), LayerRule(bits=2, dim=4, groups=3)),
        (nn.Linear(33, 48), LayerRule(bits=2, dim=4, axis=1)),
        (nn.Linear(33, 48), LayerRule(bits=3, dim=2, axis=1, groups=4)),
        (nn.Conv2d(10, 16, 3), LayerRule(bits=2, dim=4, axis=1)),
        (nn.Conv2d(7, 15, 3), LayerRule(bits=2, dim=4)),
    ],
)
def test_the_gradient_of_every_layout_is_autograd_s(layer: nn.Module, rule: LayerRule) -> None:
    settings = DkmSettings(tau=1.0, iterations=3, eps=0)
    prepare(layer, CompressionSpec(rules=(rule,), small_layer_size=0), settings)
    (dkm,) = (part for part in layer.modules() if isinstance(part, DkmWeight))
    original = layer.get_parameter("parametrizations.weight.original")
    plain = original.detach().double().requires_grad_()
    expected = _clustered(plain, dkm.layout, dkm.centroids.double(), dkm.tau, 3)
    soft = layer.train().weight
    assert isinstance(soft, Tensor)
    cotangent = torch.randn(soft.shape, generator=torch.Generator().manual_seed(0))
    soft.backward(cotangent)
    expected.backward(cotangent.double())
    torch.testing.assert_close(soft.double(), expected, rtol=1e-5, atol=1e-5)
    assert original.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(original.grad.double(), plain.grad, rtol=1e-3, atol=1e-3)


def test_sensitivity_is_the_mean_squared_gradient() -> None:
    model = nn.Linear(32, 32, bias=False)
    inputs, targets = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(0))
    pairs = list(zip(inputs, targets, strict=True))
    found = measure_sensitivity(model, (((model(x) - y) ** 2).mean() for x, y in pairs))
    with torch.no_grad():
        gradients = [2 * (model(x) - y).T @ x / y.numel() for x, y in pairs]
    torch.testing.assert_close(found["weight"], torch.stack(gradients).square().mean(0))
    assert model.weight.grad is None
    with pytest.raises(InvalidInput, match="at least one batch"):
        measure_sensitivity(model, ())
    with pytest.raises(InvalidInput, match=r"of weight is \[32\], the weight \[32, 32\]"):
        prepare(model, _spec(bits=2), sensitivity={"weight": torch.ones(32)})


def test_a_recipe_measures_sensitivity() -> None:
    recipe = {
        "task": {"factory": "dkm_models.digits:Digits"},
        "model": {
            "name": "mlp",
            "factory": "tests.test_distributed:Mlp",
            "inputs": [{"name": "image", "shape": [1, 1, 8, 8]}],
        },
        "compression": {"rules": [{"bits": 2}], "small_layer_size": 0},
    }
    centroids = []
    for batches in (0, 2):
        dkm = {"epochs": 0, "sensitivity_batches": batches}
        model, _ = run_recipe(Recipe.model_validate(recipe | {"dkm": dkm}), lambda *_: None)
        centroids.append(model.palettes["hidden.weight"].lut)
    assert not np.array_equal(centroids[0], centroids[1])


def test_nothing_to_palettize_is_an_error() -> None:
    spec = CompressionSpec(rules=(LayerRule(kinds=(LayerKind.EMBEDDING,), bits=2),))
    with pytest.raises(InvalidInput, match=r"no layer .* becomes a palette: no rule asks for"):
        prepare(convolutions(), spec)
    with pytest.raises(InvalidInput, match="no DKM layers"):
        finalize(convolutions(), SOURCE)
    with pytest.raises(InvalidInput, match=r"stem.0.weight is torch.float64, allowed: "):
        prepare(convolutions().double(), _spec(bits=2))


def test_a_model_is_prepared_only_once() -> None:
    model, spec = convolutions(), _spec(bits=2)
    prepare(model, spec)
    with pytest.raises(InvalidInput, match=r"stem.0.weight is parametrized already"):
        prepare(model, spec)
