from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dkm_export.cli.main import main
from dkm_export.errors import InvalidInput
from dkm_export.files import CHECKPOINT, METRICS
from dkm_export.training.recipe import Recipe, load_recipe
from dkm_export.training.resume import ResumeFile, Standing
from dkm_export.training.stage import run_recipe

ROOT = Path(__file__).parents[1]
RECIPE = """
task = { factory = "dkm_models.digits:Digits" }
[model]
name = "noisy"
factory = "tests.test_resume:Noisy"
inputs = [{ name = "image", shape = [1, 1, 8, 8] }]
[train]
epochs = 4
[dkm]
epochs = 4
distillation = 0.5
accumulate = 2
[compression]
small_layer_size = 0
rules = [{ bits = 3, dim = 2 }]
"""


class Noisy(nn.Module):
    """What training changes besides weights: batch norm's statistics, and random numbers drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 96)
        self.norm = nn.BatchNorm1d(96)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Linear(96, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.hidden(image.flatten(1))))
        y: Tensor = self.last(self.dropout(x))
        return y


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def _start(recipe: Path, output: Path, *options: str) -> subprocess.Popen[bytes]:
    arguments = [str(recipe), "-o", str(output), "-q", *options]
    command = [sys.executable, "-m", "dkm_export", "compress", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as many do not wait for each other
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def _standing(file: Path) -> Standing | None:
    if not file.exists():
        return None
    with safe_open(file, framework="pt") as opened:
        return Standing.model_validate_json(opened.metadata()["dkm-resume"])


def _kill(process: subprocess.Popen[bytes], file: Path, phase: str, done: int) -> None:
    """Kill -9 as soon as the file says that so many epochs of the phase are done."""
    while (standing := _standing(file)) is None or (standing.phase, standing.done) != (phase, done):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(recipe: Path) -> None:
    whole, cut = recipe.with_name("whole"), recipe.with_name("cut")
    file = ResumeFile.beside(cut).path
    uninterrupted = _start(recipe, whole)
    _kill(_start(recipe, cut), file, "dkm", 2)
    assert not cut.exists()
    assert _start(recipe, cut, "--resume").wait() == 0
    assert uninterrupted.wait() == 0
    for name in (CHECKPOINT, METRICS):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["cut", "recipe.toml", "whole"]


class Stop(Exception):
    """What a test cuts a run off with."""


def _cut_off(recipe: Recipe, file: ResumeFile, status: str) -> None:
    """Run until the first step whose status begins so."""

    def progress(found: str, done: int, total: int) -> None:
        if found.startswith(status):
            raise Stop

    with pytest.raises(Stop):
        run_recipe(recipe, progress, resume=file)


def _ignore(status: str, done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("batch_norm", ["separate", "fold-before-training"])
@pytest.mark.parametrize("status", ["fp32 epoch 2", "clustering", "dkm epoch 1", "dkm epoch 2"])
def test_going_on_from_every_stage(
    recipe: Path, status: str, batch_norm: str, tmp_path: Path
) -> None:
    settings = ["train.epochs=2", "dkm.epochs=2", f"model.batch_norm={batch_norm}"]
    short = load_recipe(recipe, settings)
    file = ResumeFile(tmp_path / "x.resume.safetensors")
    _cut_off(short, file, status)
    trained: list[str] = []
    model, metrics = run_recipe(short, lambda found, *steps: trained.append(found), resume=file)
    assert trained[0].startswith("fp32 epoch 2" if status.startswith("fp32") else "clustering")
    expected, expected_metrics = run_recipe(short, _ignore)
    assert metrics == expected_metrics
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_an_unfinished_run_is_not_lost_by_mistake(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = recipe.with_name("run")
    file = ResumeFile.beside(output)
    _cut_off(load_recipe(recipe), file, "fp32 epoch 2")
    before = file.path.read_bytes()
    short = ["--set", "train.epochs=1", "--set", "dkm.epochs=0", "-q"]
    command = ["compress", str(recipe), "-o", str(output), *short]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file.path} holds an unfinished run: pass --resume" in line
    assert "--force to start over" in line
    assert main([*command, "--resume"]) == 2
    assert "belongs to another recipe, seed or weights file" in capsys.readouterr().err
    assert file.path.read_bytes() == before
    assert main([*command, "--force"]) == 0
    assert not file.path.exists()
    assert output.exists()


def test_resume_without_a_file_starts_at_the_beginning(recipe: Path) -> None:
    output = recipe.with_name("run")
    short = ["--set", "train.epochs=1", "--set", "dkm.epochs=0", "-q"]
    assert main(["compress", str(recipe), "-o", str(output), "--resume", *short]) == 0
    assert (output / CHECKPOINT).exists()


def _edit(file: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def _header(old: str, new: str) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        assert old in metadata["dkm-resume"]
        metadata["dkm-resume"] = metadata["dkm-resume"].replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("model.norm.running_var"), "'model.norm.running_var' is missing"),
        (lambda t, m: t.pop("optimizer.last.bias.step"), "'optimizer.last.bias.step' is missing"),
        (lambda t, m: t.update(more=torch.zeros(1)), "tensor 'more' is unknown"),
        (
            lambda t, m: t.update({"optimizer.last.bias.exp_avg": torch.zeros(11)}),
            r"'optimizer.last.bias.exp_avg' is torch.float32\[11\], expected torch.float32\[10\]",
        ),
        (
            lambda t, m: t.update({"model.last.bias": torch.zeros(10).half()}),
            r"'model.last.bias' is torch.float16\[10\], expected torch.float32\[10\]",
        ),
        (lambda t, m: m.clear(), "no 'dkm-resume' metadata"),
        (_header('"schema_version":1', '"schema_version":2'), "'schema_version': Input should"),
        (_header('"done":1', '"done":9'), "'done': the recipe has fewer than 9 epochs"),
        (_header('"done":1', '"done":0'), "'done': Input should be greater"),
        (_header('"phase":"fp32"', '"phase":"dkm"'), "not those of the epochs that are done"),
        (_header('"steps":23', '"steps":24'), "'steps': an epoch had 24 steps and has 23"),
        (_header('"fp32":null', '"fp64":null'), "'fp64': unknown key, allowed: schema_version"),
    ],
)
def test_damaged_files_are_named(
    recipe: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor], dict[str, str]], object],
    message: str,
) -> None:
    file = ResumeFile(tmp_path / "x.resume.safetensors")
    _cut_off(load_recipe(recipe), file, "fp32 epoch 2")
    _edit(file.path, change)
    with pytest.raises(InvalidInput, match=message) as caught:
        run_recipe(load_recipe(recipe), _ignore, resume=file)
    assert str(caught.value).startswith(f"{file.path}: ")
    assert str(caught.value).endswith(": pass --force to start over")


@pytest.mark.parametrize("kind", ["cut", "pickle", "empty"])
def test_files_that_are_not_safetensors(recipe: Path, tmp_path: Path, kind: str) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "executed"),)

    file = ResumeFile(tmp_path / "x.resume.safetensors")
    _cut_off(load_recipe(recipe), file, "fp32 epoch 2")
    if kind == "pickle":
        torch.save({"model": Evil()}, file.path)
    else:
        file.path.write_bytes(file.path.read_bytes()[: -10 if kind == "cut" else 0])
    with pytest.raises(InvalidInput, match=r"x.resume.safetensors: not a safetensors file, or cut"):
        run_recipe(load_recipe(recipe), _ignore, resume=file)
    assert not (tmp_path / "executed").exists()


def test_other_weights_are_another_run(recipe: Path, tmp_path: Path) -> None:
    weights = {}
    for name in ("a", "b"):
        weights[name] = tmp_path / f"{name}.safetensors"
        save_file(Noisy().state_dict(), weights[name])
    file = ResumeFile(tmp_path / "x.resume.safetensors")
    a, b = (load_recipe(recipe, [f"model.weights={weights[name]}"]) for name in ("a", "b"))
    _cut_off(a, file, "fp32 epoch 2")
    with pytest.raises(InvalidInput, match="another recipe, seed or weights file"):
        run_recipe(b, _ignore, resume=file)
    weights["b"].write_bytes(weights["a"].read_bytes())  # the same weights in another place
    assert file.standing(b)
