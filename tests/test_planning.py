from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dkm_export.cli.main import main
from dkm_export.planning.candidates import Setting, candidates
from dkm_export.planning.planner import Budget, Question, make_plan
from dkm_export.spec import CompressionSpec, LayerRule
from dkm_export.training.recipe import load_recipe
from dkm_models.digits import Digits
from tests.commands import Dkm

ROW = "[{name='x', shape=[1, 48]}]"
IMAGE = "[{name='image', shape=[1, 3, 16, 16]}]"
TOKENS = "[{name='tokens', shape=[1, 12], dtype='int32', high=96}]"


class Odd(Digits):
    """Digits whose distillation fails as asked."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def distillation(self, output: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        if self.how == "raises":
            raise ValueError("no logits")
        return output.sum() * torch.nan if self.how == "nan" else output.detach().sum()


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


BOTH = pytest.mark.parametrize("method", ["--measure", "--no-measure"])


@pytest.fixture
def row(tmp_path: Path) -> Path:
    return recipe_file(tmp_path, "tests.outputs:number", ROW)


@BOTH
@pytest.mark.parametrize(
    ("factory", "inputs", "more"),
    [
        ("tests.zoo:convolutions", IMAGE, "batch_norm = 'fold-before-training'"),
        ("tests.zoo:tokens", TOKENS, ""),
        ("tests.zoo:tied", TOKENS, ""),
        ("tests.zoo:unused", ROW, ""),
        ("tests.zoo:arithmetic", ROW, ""),  # one layer
        ("tests.outputs:brackets", ROW, ""),
        ("tests.outputs:number", ROW, ""),
        ("tests.outputs:half", ROW, ""),
        ("tests.outputs:score", ROW, ""),
        ("tests.outputs:little_ties", "[{name='x', shape=[1, 16]}]", ""),
    ],
)
def test_the_recipe_that_is_written_is_what_was_planned(
    dkm: Dkm, tmp_path: Path, factory: str, inputs: str, more: str, method: str
) -> None:
    rule = "{bits=4, lut='int8', freeze=true}"
    file = recipe_file(tmp_path, factory, inputs, more, rule=rule)
    sets = ["--seed", 7, "--set", "dkm.tau=0.3", "--set", "compression.small_layer_bits=5", method]
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


@pytest.mark.slow
def test_a_plan_is_no_worse_than_anything_uniform(tmp_path: Path) -> None:
    least = None
    recipe = load_recipe(recipe_file(tmp_path, "tests.zoo:convolutions", IMAGE))
    question = Question(file=tmp_path / "sensitivities.json")
    for rate in (1.5, 2, 3, 4.5, 8, 33):
        plan, _ = make_plan(recipe, Budget(bits_per_weight=rate), question, ignore)
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
        *("plan", file, "--bits-per-weight", 12, "--pin", "up.*=3/1/4", "--pin", "stem*=dense"),
        *("--pin", "line.*=8/1", "--pin", "line.*=5/2", "--exclude", "head.*"),
        *("--exclude", "up.*", "--pin", "up.*=3/1/4"),
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
        (["--settings", "4/5", "--exclude", "[!u]*", "--target", "coreml"], 4, "up.weight canno"),
        (["--settings", "8/64"], 2, "up.weight cannot have any of its settings .8/64: a palette"),
        (
            ["--exclude", "*"],
            2,
            "no layer gets a palette: allow fewer bytes, or exclude less",
        ),
        (["--settings", "dense"], 2, "'dense' is no setting"),
        (["--set", "coreml.lut=int8"], 2, "option for 'coreml', which is no chosen target: none"),
        (
            ["--target", "coreml", "--set", "coreml.lut=int8", "--pin", "up.*=4/1"],
            4,
            "up.weight at 4/1: coreml: its LUT is not int8 times a power of two",
        ),
    ):
        budget = [] if "--budget" in arguments else ["--bits-per-weight", 4]
        result, found = dkm("plan", file, *budget, *arguments)
        assert result == code, found["error"]
        assert re.search(message, found["error"]["message"])


@pytest.mark.parametrize(
    ("factory", "inputs", "size", "bits"),
    [
        ("tests.zoo:convolutions", IMAGE, 4000, 7),
        ("tests.outputs:number", ROW, 1000, 8),  # too much for 96 weights, which stay dense
    ],
)
def test_uniform_settings_are_those_of_recipes(
    dkm: Dkm, tmp_path: Path, factory: str, inputs: str, size: int, bits: int
) -> None:
    file = recipe_file(tmp_path, factory, inputs)
    small = {"small_layer_size": size, "small_layer_bits": bits}
    sets = [x for key, value in small.items() for x in ("--set", f"compression.{key}={value}")]
    _, found = dkm("plan", file, "--bits-per-weight", 4, *sets)
    points = {point["name"]: point["bytes"] for point in found["plan"]["uniform"]}
    for name, rule in (("2/1", "bits=2"), ("4/4", "bits=4, dim=4")):
        ask = ["compress", file, "--dry-run", *sets, "--set", f"compression.rules=[{{{rule}}}]"]
        _, found = dkm(*ask)
        assert points[name] == sum(layer["bytes"] for layer in found["layers"])


def test_small_layers_without_their_bits_make_no_uniform_setting(dkm: Dkm, tmp_path: Path) -> None:
    file = recipe_file(tmp_path, "tests.zoo:convolutions", IMAGE)
    sets = ["--set", "compression.small_layer_size=4000", "--settings", "4/1,2/1"]
    code, found = dkm("plan", file, "--bits-per-weight", 3, *sets)
    assert (code, found["plan"]["uniform"]) == (0, [])


def test_a_layer_too_small_for_the_axis_stays_dense(dkm: Dkm, tmp_path: Path) -> None:
    file = recipe_file(tmp_path, "tests.zoo:convolutions", IMAGE, rule="{bits=4, axis=2}")
    sets = ["--set", "compression.small_layer_size=1200", "--settings", "4/1"]
    code, found = dkm("plan", file, "--bits-per-weight", 8, *sets)
    assert code == 0
    assert "head.weight" in [x["name"] for x in found["plan"]["layers"] if not x["bits"]]


def test_options_of_targets_are_told(dkm: Dkm, row: Path, tmp_path: Path) -> None:
    output = tmp_path / "planned.toml"
    ask = ["plan", row, "--bits-per-weight", 3, "-o", output]
    sets = ["--set", "coreml.precision=fp32", "--set", "coreml.author=a 'b'\n[c]"]
    assert dkm(*ask, "--target", "coreml", *sets)[0] == 0
    told = "# To be exported with --set coreml.precision=fp32 --set 'coreml.author=a '\"'\"'b'"
    assert told in output.read_text()
    load_recipe(output)


def test_a_tied_weight_counts_once_in_the_size_of_a_model() -> None:
    embedding, head = nn.Embedding(6000, 100), nn.Linear(100, 6000, bias=False)
    head.weight = embedding.weight
    spec = CompressionSpec(rules=(LayerRule(bits=4),))
    (layer,) = candidates(nn.Sequential(embedding, head), spec, (), (), ())
    assert Setting(4, 1, 6000) in layer.settings  # which only small models have


def test_budgets(dkm: Dkm, tmp_path: Path) -> None:
    file = recipe_file(tmp_path, "tests.zoo:tokens", TOKENS)
    kept = ["--sensitivities", tmp_path / "kept.json"]
    sizes = {}
    for text, limit in (("9kB", 9000), ("8.2kB", 8200), ("0.008MiB", 8388), ("1GB", 10**9)):
        code, found = dkm("plan", file, "--budget", text, *kept)
        assert code == 0
        assert found["plan"]["limit"] == limit
        sizes[limit] = found["plan"]["bytes"]["checkpoint"]
    for limit in (9000, 8200, 8388):
        assert 0.98 * limit < sizes[limit] <= limit, sizes
    assert sizes[10**9] > 12_000
    code, found = dkm("plan", file, "--budget", "1kB", *kept)
    assert code == 2
    least = re.search("smallest settings it is ([0-9,]+)", found["error"]["message"])
    assert least
    number = int(least[1].replace(",", ""))
    assert dkm("plan", file, "--budget", number, *kept)[0] == 0
    assert dkm("plan", file, "--budget", number - 1, *kept)[0] == 2
    code, found = dkm("plan", file, "--bits-per-weight", 0.1, *kept)
    least = re.search(r"smallest settings take ([0-9.]+)", found["error"]["message"])
    assert least
    assert dkm("plan", file, "--bits-per-weight", least[1], *kept)[0] == 0
    small = recipe_file(tmp_path, "tests.zoo:arithmetic", ROW)  # which could stay dense as a whole
    code, found = dkm("plan", small, "--budget", "1GB")
    assert (code, "no layer gets a palette" in found["error"]["message"]) == (2, True)
    for option, value, message in (
        ("--budget", "0", "the budget has to be more than 0"),
        ("--budget", "0.1B", "the budget has to be more than 0"),
        ("--budget", "9" * 400, "is more than a file can have"),
        ("--budget", "nan", "is no size"),
        ("--budget", "3.3 mb", "is no size"),
        ("--bits-per-weight", "0", "the budget has to be more than 0"),
        ("--bits-per-weight", "nan", "is no number of at least 0"),
        ("--bits-per-weight", "9" * 400, "is no number of at least 0"),
        ("--max-drop", "inf", "is no number of at least 0"),
        ("--max-drop", "1", "a budget of the metric needs a recipe with a task"),
    ):
        code, found = dkm("plan", file, option, value)
        assert code == 2
        assert message in found["error"]["message"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Integers", [], "no output of the model is a floating-point number"),
        ("Cut", ["--no-measure"], "cannot be differentiated by its weights: use --measure"),
        ("Cut", [], None),
    ],
)
def test_outputs_that_cannot_be_compared(
    dkm: Dkm, tmp_path: Path, name: str, options: list[str], message: str | None
) -> None:
    file = recipe_file(tmp_path, f"tests.outputs:{name}", ROW)
    code, found = dkm("plan", file, "--bits-per-weight", 3, *options)
    assert code == (2 if message else 0)
    assert message is None or message in found["error"]["message"]


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ("raises", ["--no-measure"], "task 'Odd': its distillation failed: ValueError: no logits"),
        ("raises", ["--measure"], "task 'Odd': its distillation failed: ValueError: no logits"),
        ("nan", ["--no-measure"], ": its error at 1/1 is nan: the model's outputs, the task's dis"),
        ("nan", ["--measure"], ": its error at 1/1 is nan"),
        ("detached", ["--no-measure"], "its distillation is not a scalar tensor that depends on"),
    ],
)
def test_distillations_that_fail(dkm: Dkm, how: str, options: list[str], message: str) -> None:
    task = f"task={{factory='tests.test_planning:Odd', arguments={{how='{how}'}}}}"
    sets = ["--set", task, "--set", "train.epochs=0", "--examples", 8, "--settings", "1/1"]
    code, found = dkm("plan", "digits", "--bits-per-weight", 3, *sets, *options)
    assert code == 2
    assert message in found["error"]["message"]


@pytest.mark.parametrize(
    ("options", "words"), [([], "measured on "), (["--no-measure"], "predicted from gradients on ")]
)
def test_errors_are_the_same_in_parts_and_at_once(
    dkm: Dkm, row: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    file = tmp_path / "kept.json"
    ask = ["plan", row, "--bits-per-weight", 3, *options]
    keep = [*ask, "--sensitivities", file]
    _, fresh = dkm(*ask)
    assert fresh["plan"]["calibration"].startswith(words)
    assert dkm(*keep, "--settings", "3/2,2/1,3/2", "--exclude", "head.*")[0] == 0
    assert len(json.loads(file.read_text())["layers"]["layer.weight"]["errors"]) == 2
    code, found = dkm(*keep)
    assert (code, found["plan"]["bytes"]) == (0, fresh["plan"]["bytes"])
    # but for the rounding of products
    assert found["plan"]["error"] == pytest.approx(fresh["plan"]["error"], rel=1e-5)
    before = file.stat().st_mtime_ns
    assert dkm(*keep)[1]["plan"] == found["plan"]
    assert file.stat().st_mtime_ns == before


def test_the_file_of_sensitivities(dkm: Dkm, row: Path, tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    ask = ["plan", row, "--bits-per-weight", 3, "--sensitivities", file]
    _, fresh = dkm(*ask)
    content = file.read_bytes()

    def edited(change: Callable[[dict[str, Any]], object]) -> tuple[int, dict[str, Any]]:
        data = json.loads(content)
        change(data)
        file.write_text(json.dumps(data))
        return dkm(*ask)

    def layer(data: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = data["layers"]["layer.weight"]
        return found

    code, found = edited(lambda data: layer(data).update(factor=0))
    assert code == 0
    planned = {entry["name"]: entry for entry in found["plan"]["layers"]}["layer.weight"]
    assert (planned["error"], planned["bits"] / planned["dim"]) == (0, 0.75)  # the fewest
    assert json.loads(file.read_text())["layers"]["layer.weight"]["factor"] == 0
    # an unknown layer is kept, a missing layer or setting found again
    stranger = {"axis": 0, "lut": "float16", "errors": {"any": 1}}
    code, found = edited(
        lambda data: (
            data["layers"].update(stranger=stranger),
            layer(data)["errors"].pop("3/1"),
            data["layers"].pop("head.weight"),
        )
    )
    assert (code, found["plan"]["bytes"]) == (0, fresh["plan"]["bytes"])
    kept = json.loads(file.read_text())["layers"]
    assert kept.pop("stranger")["errors"] == {"any": 1}
    for name, entry in json.loads(content)["layers"].items():
        assert kept[name]["errors"] == pytest.approx(entry["errors"], rel=1e-5)
    # a finer setting that is found counts as no worse than the coarser one
    code, _ = edited(
        lambda data: layer(data)["errors"].update(
            {"2/1": 1e-9 * layer(data)["errors"].pop("2/1/2")}
        )
    )
    assert code == 0
    errors = json.loads(file.read_text())["layers"]["layer.weight"]["errors"]
    assert errors["2/1/2"] == pytest.approx(0.999 * errors["2/1"])
    changes: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda data: layer(data).update(factor=float("nan")), "layer.weight.factor"),
        (lambda data: layer(data).update(factor=-1), "layer.weight.factor"),
        (lambda data: layer(data).update(factor=1e300), "layer.weight.factor"),
        (lambda data: layer(data)["errors"].update({"3/1": "much"}), "errors.3/1"),
        (lambda data: layer(data).update(axis=1), "are of axis 1 and lut float16, not 0 and"),
        (lambda data: data.update(extra=1), "'extra'"),
        (lambda data: data.update(schema_version=2), "schema_version"),
        (lambda data: data.update(fingerprint="0"), "of another model, task, data or version"),
    ]
    for change, message in changes:
        code, found = edited(change)
        assert code == 2
        assert found["error"]["message"].startswith(f"{file}: ")
        assert message in found["error"]["message"]
    file.write_bytes(content)
    code, found = dkm(*ask, "--no-measure")
    assert (code, "are measured, not predicted from g" in found["error"]["message"]) == (2, True)
    for other in (["--seed", "1"], ["--set", "model.factory='tests.zoo:arithmetic'"]):
        code, found = dkm(*ask, *other)
        assert (code, "of another model, task" in found["error"]["message"]) == (2, True)
    code, found = dkm(*ask, "--set", "compression.rules=[{bits=4, lut='int8'}]")
    assert (code, "remove that layer there" in found["error"]["message"]) == (2, True)
    assert file.read_bytes() == content


def test_no_file_is_lost(dkm: Dkm, row: Path, tmp_path: Path) -> None:
    notes, folder, link = tmp_path / "notes.txt", tmp_path / "folder", tmp_path / "link"
    notes.write_text("mine")
    folder.mkdir()
    link.symlink_to(tmp_path / "nowhere")
    ask = ["plan", row, "--bits-per-weight", 3]
    same = tmp_path / "same"
    for arguments, message in (
        (["--sensitivities", notes], "Invalid JSON"),
        (["--sensitivities", folder], "is a folder"),
        (["--sensitivities", link], "is a link"),
        (["--sensitivities", row], "holds the input"),
        (["--sensitivities", same, "-o", same], "holds the input"),
        (["--sensitivities", notes, "-o", notes, "--force"], "holds the input"),
        (["-o", row, "--force"], "holds the input"),
        (["-o", notes], "exists"),
        (["-o", folder, "--force"], "is a folder, which --force does not replace"),
    ):
        code, found = dkm(*ask, *arguments)
        assert code == 2
        assert message in found["error"]["message"]
    weights = tmp_path / "weights.safetensors"
    weights.write_text("mine")
    sets = ["--set", f"model.weights='{weights}'", "--force", "-o", weights]
    assert "holds the input" in dkm(*ask, *sets)[1]["error"]["message"]
    assert notes.read_text() == weights.read_text() == "mine"
    assert not same.exists()
    assert not list(folder.iterdir())
    assert "[model]" in row.read_text()


@pytest.mark.parametrize(
    ("method", "phase"), [("--measure", "measuring"), ("--no-measure", "clustering")]
)
def test_an_interrupted_plan_leaves_nothing(tmp_path: Path, method: str, phase: str) -> None:
    file = recipe_file(tmp_path, "tests.zoo:convolutions", IMAGE)
    output, kept = tmp_path / "planned.toml", tmp_path / "kept.json"
    before = set(tmp_path.iterdir())
    # what a shell starts in the background ignores Ctrl-C, and so does what that starts
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from dkm_export.cli.main import main; sys.exit(main())"
    )
    ask = ["plan", str(file), "--bits-per-weight", "3", method]
    with subprocess.Popen(
        [
            *(sys.executable, "-u", "-c", program, *ask),
            *("-o", str(output), "--sensitivities", str(kept)),
        ],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(phase):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert "Traceback" not in rest
    assert "interrupted" in rest
    assert set(tmp_path.iterdir()) == before


def test_mistakes_show_before_the_training(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = tmp_path / "kept.json"
    broken.write_text("{")
    for arguments in (
        ["--pin", "nothing=4/1"],
        ["--sensitivities", str(broken)],
        ["--settings", "4/5", "--target", "coreml"],
        ["--exclude", "*"],
    ):
        assert main(["plan", "digits", "--bits-per-weight", "3", *arguments]) in (2, 4)
        assert "epoch" not in capfd.readouterr().err


@pytest.mark.slow
def test_the_smallest_plan_that_keeps_the_metric(dkm: Dkm, tmp_path: Path) -> None:
    ask = ["plan", "digits", "--set", "train.epochs=1", "--set", "dkm.epochs=0"]
    some = ["--settings", "1/1,2/1,4/1,8/1,4/4", "--sensitivities", tmp_path / "kept.json"]
    output = tmp_path / "planned.toml"
    code, found = dkm(*ask, *some, "--max-drop", 1.5, "-o", output)
    assert code == 0
    points = found["plan"]["front"]
    payload = sum(layer["bytes"] for layer in found["plan"]["layers"])
    assert points[0]["bytes"] < payload < points[-1]["bytes"]
    code, run = dkm("compress", output, "-o", tmp_path / "run")
    assert code == 0
    assert run["metrics"]["fp32"] - run["metrics"]["hard"] <= 1.5
    code, found = dkm(*ask, "--max-drop", 0, "--settings", "1/1", "--exclude", "hidden.*")
    assert code == 2
    assert "no plan keeps the metric within 0 of" in found["error"]["message"]
