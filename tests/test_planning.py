from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dkm_export.cli.main import main
from dkm_export.clustering.kmeans import (
    assign,
    inertia,
    initial_centroids,
    nearest,
    quick_centroids,
)
from dkm_export.clustering.optimal import optimal_centroids, optimal_tables
from dkm_export.planning.candidates import DEFAULT_SETTINGS, Setting, candidates
from dkm_export.planning.planner import Budget, Question, make_plan
from dkm_export.planning.sensitivity import (
    Calibration,
    measured_errors,
    predicted_errors,
    scales_of,
)
from dkm_export.spec import CompressionSpec, LayerRule
from dkm_export.training.recipe import find_recipe, load_recipe
from dkm_models.digits import Digits
from tests.zoo import HalfLine, Tied, lively

ROW = "[{name='x', shape=[1, 48]}]"
IMAGE = "[{name='image', shape=[1, 3, 16, 16]}]"
TOKENS = "[{name='tokens', shape=[1, 12], dtype='int32', high=96}]"


class Brackets(nn.Module):
    """Layers whose names are patterns; two outputs of different size, and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"[ab]*": nn.Linear(48, 96), "?": nn.Linear(96, 48)})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.tanh(self.parts["[ab]*"](x))
        z = self.parts["?"](y)
        return 1000 * z, y, z.argmax(1, keepdim=True)


class Number(nn.Module):
    """One number per example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(48, 96), nn.Linear(96, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.layer(x)))
        return y


class Half(nn.Module):
    """A bfloat16 layer between others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.half = nn.Linear(48, 64), HalfLine(64, 96)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.half(torch.tanh(self.layer(x)))
        return y


class Integers(nn.Module):
    """No output that could be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).argmax(1, keepdim=True)


class Cut(nn.Module):
    """An output that no weight gets a gradient from."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).detach()


class Odd(Digits):
    """Digits whose distillation fails as asked."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def distillation(self, output: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        if self.how == "raises":
            raise ValueError("no logits")
        return output.sum() * torch.nan if self.how == "nan" else output.detach().sum()


def brackets() -> nn.Module:
    return lively(Brackets())


def number() -> nn.Module:
    return lively(Number())


def half() -> nn.Module:
    return lively(Half())


def ignore(status: str, done: int, total: int) -> None:
    assert 0 < done <= total
    assert status


def recipe_text(factory: str, inputs: str, more: str = "", rule: str = "{bits=4}") -> str:
    outputs = "['a', 'b', 'c']" if factory.endswith("brackets") else "['y']"
    return f"""
    [model]
    name = "small"
    factory = "{factory}"
    inputs = {inputs}
    outputs = {outputs}
    {more}
    [dkm]
    epochs = 0
    [compression]
    small_layer_size = 0
    rules = [{rule}]
    """


def recipe_file(folder: Path, factory: str, inputs: str, more: str = "", **rest: str) -> Path:
    file = folder / "recipe.toml"
    file.write_text(recipe_text(factory, inputs, more, **rest))
    return file


Dkm = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def dkm(capfd: pytest.CaptureFixture[str]) -> Dkm:
    """Run ``dkm ... --json``; returns the exit code and the object."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        capfd.readouterr()
        code = main([*map(str, arguments), "--json"])
        return code, json.loads(capfd.readouterr().out)

    return run


@pytest.fixture
def row(tmp_path: Path) -> Path:
    return recipe_file(tmp_path, "tests.test_planning:number", ROW)


@pytest.mark.parametrize(
    ("factory", "inputs", "more"),
    [
        ("tests.zoo:convolutions", IMAGE, "batch_norm = 'fold-before-training'"),
        ("tests.zoo:tokens", TOKENS, ""),
        ("tests.zoo:tied", TOKENS, ""),
        ("tests.zoo:unused", ROW, ""),
        ("tests.zoo:arithmetic", ROW, ""),  # one layer
        ("tests.test_planning:brackets", ROW, ""),
        ("tests.test_planning:number", ROW, ""),
        ("tests.test_planning:half", ROW, ""),
    ],
)
def test_the_recipe_that_is_written_is_what_was_planned(
    dkm: Dkm, tmp_path: Path, factory: str, inputs: str, more: str
) -> None:
    rule = "{bits=4, lut='int8', freeze=true}"
    file = recipe_file(tmp_path, factory, inputs, more, rule=rule)
    sets = ["--seed", 7, "--set", "dkm.tau=0.3", "--set", "compression.small_layer_bits=5"]
    output = tmp_path / "planned.toml"
    code, found = dkm("plan", file, "--bits-per-weight", 3, "-o", output, *sets)
    assert code == 0
    plan = found["plan"]
    original = load_recipe(file, ["seed=7", "dkm.tau=0.3"])
    planned = load_recipe(output)
    assert planned == original.model_copy(update={"compression": planned.compression})
    assert planned.compression.small_layer_bits == 5
    by_name = {layer["name"]: layer for layer in plan["layers"]}
    code, dry = dkm("compress", output, "--dry-run")
    assert code == 0
    for layer in dry["layers"]:
        if layer["name"] in by_name:
            expected = by_name[layer["name"]]
            kept = {key: expected[key] for key in ("bits", "dim")}
            assert {key: layer[key] for key in kept} == kept
            assert layer["bytes"] == expected["bytes"]
    assert all(
        rule.skip or (rule.lut, rule.freeze) == ("int8", True) for rule in planned.compression.rules
    )
    # the bytes of the mock-up are those of the checkpoint
    assert dkm("compress", output, "-o", tmp_path / "run")[0] == 0
    real = (tmp_path / "run/model.dkm.safetensors").stat().st_size
    assert plan["bytes"] == {"checkpoint": real}
    used = [layer["error"] for layer in plan["layers"] if layer["bits"]]
    if factory != "tests.zoo:unused":
        assert all(error > 0 for error in used)
    # the same again
    _, again = dkm("plan", file, "--bits-per-weight", 3, *sets)
    assert again["plan"] == plan


def test_predictions_follow_measurements() -> None:
    recipe = load_recipe(find_recipe("digits"), ["train.epochs=2"])
    settings = tuple(Setting.parse(text) for text in ("2/1", "3/1", "4/1", "4/2", "6/4", "2/1/8"))
    plans = {}
    for method in ("gradients", "measured"):
        question = Question(settings=settings, method=method, examples=64)  # type: ignore[arg-type]
        plans[method], _ = make_plan(recipe, Budget(bits_per_weight=3), question, ignore)
    uniform = [
        {point.name: point.error for point in plans[method].uniform}
        for method in ("gradients", "measured")
    ]
    assert uniform[0].keys() == uniform[1].keys() >= {"2/1", "3/1", "4/1", "4/2", "6/4"}
    for name, predicted in uniform[0].items():
        assert 1 / 3 < predicted / uniform[1][name] < 3
    plan = plans["gradients"]
    assert plan.bound <= plan.error
    for point in plan.uniform:
        if point.bytes <= plan.point.bytes:
            continue
        assert plan.error >= 0
    assert all(plan.error <= point.error for point in plan.uniform if point.bytes <= plan.bound)


def calibration_of(model: nn.Module, inputs: list[tuple[Tensor, ...]]) -> Calibration:
    def divergence(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Tensor:
        return (ours[0] - theirs[0]).square().mean()

    return Calibration(model, inputs, divergence, scales_of(model, inputs), 0)


def test_predictions_of_a_linear_model_are_its_errors() -> None:
    """Of mean squared outputs the second order is all there is."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(48, 256, bias=False).eval()
    inputs = [(torch.randn(64, 48, generator=generator),) for _ in range(8)]
    calibration = calibration_of(model, inputs)
    spec = CompressionSpec(rules=(LayerRule(bits=4),), small_layer_size=0)
    layers = candidates(model, spec, DEFAULT_SETTINGS, (), ())
    wanted = [(layer, [x for x in layer.settings if x]) for layer in layers]
    predicted = predicted_errors(calibration, wanted, ignore)
    measured = measured_errors(calibration, wanted, ignore)
    assert len(predicted) > 15
    for key, error in measured.items():
        assert predicted[key] == pytest.approx(error, rel=0.15)


def test_the_model_is_left_as_it_is() -> None:
    model = lively(Tied())
    model.hidden.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    threads = torch.get_num_threads()
    inputs = [(torch.arange(12)[None],), (torch.arange(12, 24)[None],)]
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


@pytest.mark.parametrize("dim", [1, 2, 4, 8])
@pytest.mark.parametrize("weighted", [False, True])
def test_quick_centroids_are_almost_as_good(dim: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(dim)
    vectors = torch.randn(2, 40_000, dim, generator=generator) ** 3
    counts = torch.rand(2, 40_000, generator=generator) if weighted else None
    ks = (4, 16, 64)
    found = quick_centroids(vectors, ks, 0, counts)
    for k, quick in zip(ks, found, strict=True):
        best = initial_centroids(vectors, k, 0, counts)
        indices = [nearest(vectors, centroids) for centroids in (quick, best)]
        errors = [
            (vectors - torch.stack([c[i] for c, i in zip(centroids, which, strict=True)]))
            .square()
            .sum(-1)
            .mul(1 if counts is None else counts)
            .sum()
            for centroids, which in zip((quick, best), indices, strict=True)
        ]
        assert errors[0] <= 1.06 * errors[1]
    # whatever else is asked for
    if dim > 1:
        assert torch.equal(quick_centroids(vectors, (16,), 0, counts)[0], found[1])


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nearest_agrees_with_assign(dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    vectors = (torch.randn(3, 5000, dim, generator=generator) + 2).to(dtype)
    centroids = torch.randn(3, 32, dim, generator=generator).half().float() + 2
    centroids[:, 7] = centroids[:, 20]  # a tie
    one, other = nearest(vectors, centroids), assign(vectors.float(), centroids)
    groups = torch.arange(3)[:, None]
    distances = [
        (vectors.double() - centroids[groups, which].double()).square().sum(-1)
        for which in (one, other)
    ]
    assert torch.allclose(distances[0], distances[1], rtol=1e-5, atol=1e-6)
    differing = one != other
    assert differing.float().mean() < 0.2
    assert torch.equal(centroids[groups, one][~differing], centroids[groups, other][~differing])
    total = inertia(vectors, centroids)
    assert torch.allclose(total, distances[1].sum(1), rtol=1e-4)


def test_tables_are_the_optimal_centroids() -> None:
    generator = torch.Generator().manual_seed(1)
    values, weights = torch.randn(3000, generator=generator), torch.rand(3000, generator=generator)
    ks = (1, 2, 5, 16, 256, 5000)
    for counts in (None, weights):
        for k, found in zip(ks, optimal_tables(values, ks, counts), strict=True):
            assert torch.equal(found, optimal_centroids(values, k, counts))


def plan_of(
    factory: str, inputs: str, budget: Budget, tmp_path: Path, **question: Any
) -> tuple[Any, CompressionSpec]:
    recipe = load_recipe(recipe_file(tmp_path, factory, inputs))
    return make_plan(recipe, budget, Question(**question), ignore)


def test_a_plan_is_no_worse_than_anything_uniform(tmp_path: Path) -> None:
    least = None
    for rate in (1.5, 2, 3, 4.5, 8, 33):
        plan, _ = plan_of("tests.zoo:convolutions", IMAGE, Budget(bits_per_weight=rate), tmp_path)
        size = plan.point.bytes
        assert size <= rate * sum(np.prod(layer.shape) for layer in plan.layers) / 8
        assert plan.error == pytest.approx(sum(layer.error for layer in plan.layers))
        assert plan.bound <= plan.error * (1 + 1e-9)
        smaller = [point for point in (*plan.uniform, *plan.front) if point.bytes <= size]
        assert len(smaller) > 3
        assert all(plan.error <= point.error * (1 + 1e-9) for point in smaller)
        assert least is None or plan.error < least
        least = plan.error


def test_pins_exclusions_and_groups(dkm: Dkm, tmp_path: Path) -> None:
    file = recipe_file(tmp_path, "tests.zoo:convolutions", IMAGE)
    code, found = dkm(
        *("plan", file, "--bits-per-weight", 4, "--pin", "up.*=3/1/4", "--pin", "stem*=dense"),
        *("--pin", "line.*=8/1", "--pin", "line.*=5/2", "--exclude", "head.*"),
    )
    assert code == 0
    layers = {layer["name"]: layer for layer in found["plan"]["layers"]}
    assert [layers["up.weight"][key] for key in ("bits", "dim", "groups")] == [3, 1, 4]
    assert [layers["line.weight"][key] for key in ("bits", "dim", "groups")] == [5, 2, 1]
    assert layers["stem.0.weight"]["bits"] is layers["head.weight"]["bits"] is None
    for arguments, code, message in (
        (["--pin", "nothing=4/1"], 2, "pattern 'nothing' matches no layer .* stem.0.weight"),
        (["--pin", "head.*=8/8"], 2, "head.weight at 8/8: a palette would be no smaller than fl"),
        (["--pin", "head.*=4/1/5"], 2, "head.weight at 4/1/5: groups 5 does not divide axis 0"),
        (["--pin", "head.*=9/1"], 2, "'9/1' is no setting: write bits/dim"),
        (["--pin", "4/1"], 2, "is no pin: write PATTERN=SETTING"),
        (["--pin", "line.*=4/5", "--target", "coreml"], 4, "line.weight at 4/5: coreml: dim 5 "),
        (["--settings", "4/5", "--exclude", "[!l]*", "--target", "coreml"], 4, "line.weight canno"),
        (["--settings", "8/64"], 2, "up.weight cannot have any of its settings .8/64: a palette"),
        (["--exclude", "*"], 2, "no layer gets a palette: allow fewer bytes, or exclude less"),
        (["--settings", "dense"], 2, "'dense' is no setting"),
        (["--set", "coreml.lut=int8"], 2, "option for 'coreml', which is no chosen target: none"),
        (
            ["--target", "coreml", "--set", "coreml.lut=int8", "--pin", "up.*=4/1"],
            4,
            "up.weight at 4/1: coreml: its LUT is not int8 times a power of two",
        ),
    ):
        result, found = dkm("plan", file, "--bits-per-weight", 4, *arguments)
        assert result == code
        assert re_search(message, found["error"]["message"])


def re_search(pattern: str, text: str) -> bool:
    import re

    assert re.search(pattern, text), text
    return True
