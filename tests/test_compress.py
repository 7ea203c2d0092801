from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dkm_export.compress import finalize, prepare, set_temperature, soft_weights
from dkm_export.errors import InvalidInput
from dkm_export.palettized import InputSpec, ModelSource
from dkm_export.parametrization import DkmSettings, DkmWeight
from dkm_export.spec import CompressionSpec, LayerKind, LayerRule
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
