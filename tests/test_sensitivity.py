from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dkm_export.planning.candidates import DEFAULT_SETTINGS, Setting, candidates
from dkm_export.planning.planner import Budget, Question, make_plan
from dkm_export.planning.sensitivity import (
    Calibration,
    can_be_measured,
    measured_errors,
    predicted_errors,
    scales_of,
)
from dkm_export.spec import CompressionSpec, LayerRule
from dkm_export.training.recipe import find_recipe, load_recipe
from tests.zoo import Tied, lively


def ignore(status: str, done: int, total: int) -> None:
    assert 0 < done <= total
    assert status


@pytest.mark.slow
def test_predictions_follow_measurements() -> None:
    recipe = load_recipe(find_recipe("digits"), ["train.epochs=2"])
    names = ("2/1", "3/1", "4/1", "4/2", "6/4")
    settings = tuple(Setting.parse(text) for text in (*names, "8/1"))  # 8 bits for small layers
    plans = {}
    for method in ("gradients", "measured"):
        question = Question(settings=settings, method=method, examples=64)
        plans[method], _ = make_plan(recipe, Budget(bits_per_weight=3), question, ignore)
    uniform = [
        {point.name: point.error for point in plans[method].uniform}
        for method in ("gradients", "measured")
    ]
    for name in names:
        assert 1 / 3 < uniform[0][name] / uniform[1][name] < 3


def calibration_of(model: nn.Module, inputs: list[tuple[Tensor, ...]]) -> Calibration:
    def divergence(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Tensor:
        return (ours[0] - theirs[0]).square().mean()

    return Calibration(model, inputs, divergence, scales_of(model, inputs), 0)


def test_predictions_of_a_linear_model_are_its_errors() -> None:
    """Of mean squared outputs the second order is all there is."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(48, 256, bias=False).eval()
    inputs: list[tuple[Tensor, ...]] = [
        (torch.randn(64, 48, generator=generator),) for _ in range(8)
    ]
    calibration = calibration_of(model, inputs)
    spec = CompressionSpec(rules=(LayerRule(bits=4),), small_layer_size=0)
    layers = candidates(model, spec, DEFAULT_SETTINGS, (), ())
    wanted = [(layer, [x for x in layer.settings if x]) for layer in layers]
    predicted = predicted_errors(calibration, wanted, ignore)
    measured = measured_errors(calibration, wanted, ignore)
    assert len(predicted) > 15
    for key, error in measured.items():
        assert 0.75 < predicted[key] / error < 1.5
    mean = np.mean([predicted[key] / error for key, error in measured.items()])
    assert 0.9 < mean < 1.25


def test_errors_of_vectors_are_means_of_clusterings() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs: list[tuple[Tensor, ...]] = [(torch.randn(64, 48, generator=generator),)]
    calibration = calibration_of(nn.Linear(48, 256, bias=False).eval(), inputs)
    spec = CompressionSpec(rules=(LayerRule(bits=4),), small_layer_size=0)
    (layer,) = candidates(calibration.model, spec, (Setting(4, 1), Setting(4, 4)), (), ())
    settings = [Setting(4, 1), Setting(4, 4)]
    references = calibration.outputs()
    errors: dict[Setting, list[float]] = {setting: [] for setting in settings}
    for seed in range(3):
        for setting, weight in replace(calibration, seed=seed).palettized(layer, settings):
            errors[setting].append(calibration.measure({layer.name: weight}, references))
    measured = measured_errors(calibration, [(layer, settings)], ignore)
    assert measured[layer.name, Setting(4, 1)] == pytest.approx(errors[Setting(4, 1)][0])
    assert measured[layer.name, Setting(4, 4)] == pytest.approx(np.mean(errors[Setting(4, 4)]))
    assert len(set(errors[Setting(4, 4)])) == 3


@pytest.mark.parametrize(("batches", "few"), [(1, True), (64, False)])
def test_few_operations_are_measured(batches: int, few: bool) -> None:
    inputs: list[tuple[Tensor, ...]] = [(torch.zeros(4096, 1024),)] * batches
    calibration = calibration_of(nn.Linear(1024, 1024).eval(), inputs[:1])
    layers = candidates(calibration.model, CompressionSpec(rules=(LayerRule(bits=4),)), (), (), ())
    assert can_be_measured(replace(calibration, inputs=inputs), layers) is few


def test_the_model_is_left_as_it_is() -> None:
    model = Tied()
    lively(model)
    model.hidden.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    threads = torch.get_num_threads()
    inputs: list[tuple[Tensor, ...]] = [(torch.arange(12)[None],), (torch.arange(12, 24)[None],)]
    calibration = calibration_of(model, inputs)
    spec = CompressionSpec(rules=(LayerRule(bits=4),), small_layer_size=0)
    layers = candidates(model, spec, (Setting(4, 1), Setting(3, 2)), (), ())
    wanted = [(layer, [x for x in layer.settings if x]) for layer in layers]
    for find in (predicted_errors, measured_errors):
        assert len(find(calibration, wanted, ignore)) == 4

        def interrupt(status: str, done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            find(calibration, wanted, interrupt)
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert all(parameter.grad is None for parameter in model.parameters())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("width", "offered"), [(256, True), (1100, False)])
def test_small_networks_may_have_a_lut_for_each_row(width: int, offered: bool) -> None:
    model = nn.Sequential(nn.Linear(48, 96, bias=False), nn.Linear(width, width, bias=False))
    spec = CompressionSpec(rules=(LayerRule(bits=4),), small_layer_size=0)
    first, _ = candidates(model, spec, (), (), ())
    by_row = {Setting(bits, 1, groups) for bits in (1, 2) for groups in (96, 48, 24)}
    assert by_row.isdisjoint(first.settings) is not offered
    assert not offered or by_row <= set(first.settings)
