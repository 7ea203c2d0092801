"""Plans for real targets: the files that come out have the bytes that were promised."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from dkm_export.exporting.export import choose_targets
from dkm_export.planning.allocation import Options
from dkm_export.planning.candidates import candidates, spec_of
from dkm_export.planning.costs import Costs
from dkm_export.planning.mockup import artifact_bytes, mock_up
from dkm_export.training.recipe import load_recipe
from tests.commands import Dkm
from tests.compiler import needs_compiler
from tests.zoo import convolutions

pytestmark = needs_compiler

TARGETS = ("coreml", "onnx", "ort", "executorch")
BUDGETS = {"coreml": 90_000, "onnx": 85_000, "ort": 120_000, "executorch": 80_000}
"""Bytes well between the smallest and the largest plan of the digits network."""

RECIPE = """
    [model]
    name = "small"
    factory = "tests.zoo:convolutions"
    inputs = [{ name = "image", shape = [1, 3, 16, 16] }]
    outputs = ["y"]
    [dkm]
    epochs = 0
    [compression]
    small_layer_size = 0
    rules = [{ bits = 4 }]
    """


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "recipe.toml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """``dkm plan`` of digits without training, whose errors are found once."""
    kept = tmp_path_factory.mktemp("digits") / "sensitivities.json"
    sets = [part for key in ("train", "dkm") for part in ("--set", f"{key}.epochs=0")]
    return ["plan", "digits", *sets, "--sensitivities", kept]


def exported(dkm: Dkm, planned: Path, targets: tuple[str, ...], folder: Path) -> dict[str, int]:
    """Bytes of the artifacts of a recipe, by target."""
    assert dkm("compress", planned, "-o", folder / "run")[0] == 0
    options = [part for target in targets for part in ("--target", target)]
    code, found = dkm("export", *options, folder / "run", "-o", folder / "out")
    assert code == 0
    return {artifact["target"]: artifact["bytes"] for artifact in found["manifest"]["artifacts"]}


@pytest.mark.parametrize(
    "target", ["onnx", *(pytest.param(x, marks=pytest.mark.slow) for x in TARGETS if x != "onnx")]
)
def test_a_target_gets_the_bytes_that_were_promised(
    dkm: Dkm, digits: list[object], tmp_path: Path, target: str
) -> None:
    planned, budget = tmp_path / "planned.toml", BUDGETS[target]
    code, found = dkm(*digits, "--budget", budget, "--target", target, "-o", planned)
    assert code == 0
    real = exported(dkm, planned, (target,), tmp_path)
    assert found["plan"]["bytes"] == real
    assert 0.99 * budget <= real[target] <= budget
    if target == "coreml":
        # what it cannot hold has not been chosen: dim has to divide the axis
        layers = [layer for layer in found["plan"]["layers"] if layer["bits"]]
        assert layers
        assert all(layer["shape"][0] % layer["dim"] == 0 for layer in layers)


@pytest.mark.slow
def test_all_targets_at_once_keep_to_the_budget(
    dkm: Dkm, digits: list[object], tmp_path: Path
) -> None:
    planned = tmp_path / "planned.toml"
    code, found = dkm(*digits, "--budget", 120_000, "--target", "all", "-o", planned)
    assert code == 0
    real = exported(dkm, planned, TARGETS, tmp_path)
    assert found["plan"]["bytes"] == real
    assert 0.99 * 120_000 <= max(real.values()) <= 120_000
    printed = tmp_path / "plan.json"
    printed.write_text(json.dumps(found))
    report = tmp_path / "report.md"
    assert dkm("report", tmp_path / "out", "--plan", printed, "-o", report)[0] == 0
    assert "this plan" in report.read_text()


@pytest.mark.parametrize(
    ("target", "plans", "most"),
    [("onnx", 6, 300), ("ort", 6, 6_000), ("coreml", 8, 2_000)],  # the 8th has a dense layer
)
def test_what_decoders_take_is_known(recipe: Path, target: str, plans: int, most: int) -> None:
    """Files of all kinds of plans differ by what is predicted, to some bytes."""
    asked, targets = load_recipe(recipe), choose_targets([target])
    model, spec = convolutions().eval(), asked.compression
    layers = candidates(model, spec, (), (), targets)
    options = [
        Options([layer.nbytes(x) for x in layer.settings], [0.0] * len(layer.settings))
        for layer in layers
    ]
    costs = Costs.of(layers, options, targets)
    random = Random(0)
    rest = []
    for same in [True, True, *[False] * (plans - 2)]:
        first = random.randrange(8)
        choices = [first if same else random.randrange(len(x.settings)) for x in layers]
        settings = {x.name: x.settings[i] for x, i in zip(layers, choices, strict=True)}
        mock = mock_up(model, asked.source(), spec_of(settings, layers, spec))
        size = artifact_bytes(mock, targets, verbose=False)[target]
        rest.append(size - costs.allocation(choices).cost)
    assert max(rest) - min(rest) < most


def test_an_older_core_ml_gets_what_it_can_hold(dkm: Dkm, recipe: Path) -> None:
    options = ["--target", "coreml", "--set", "coreml.deployment_target=iOS16"]
    code, found = dkm("plan", recipe, "--bits-per-weight", 6, *options)
    assert code == 0
    chosen = {(x["dim"], x["groups"]) for x in found["plan"]["layers"] if x["bits"]}
    assert chosen == {(1, 1)}
    assert dkm("plan", recipe, "--bits-per-weight", 6, *options[:2])[0] == 0
    code, found = dkm("plan", recipe, "--bits-per-weight", 6, *options, "--settings", "4/2")
    assert code == 4
    assert "coreml: dim 2 cannot be held" in found["error"]["message"]
