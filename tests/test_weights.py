from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dkm_export.cli.main import main
from dkm_export.errors import InvalidInput
from dkm_export.training.recipe import load_recipe
from dkm_export.training.stage import run_recipe
from dkm_export.training.weights import load_weights, read_config


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)


class Renaming(nn.Module):
    """Loads files with another name for its layer, and without its head."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        self.body = nn.Linear(config["width"], config["width"])
        self.head = nn.Linear(config["width"], 2)

    def adapt_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = {name.replace("dense.", "body."): tensor for name, tensor in state.items()}
        return {name: t for name, t in self.state_dict().items() if "head" in name} | renamed

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


class Broken(Renaming):
    def adapt_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise KeyError("no way")


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.mark.parametrize("wrap", ["plain", "training script's", "DataParallel's", "both"])
def test_files_as_training_scripts_write_them(tmp_path: Path, net: Net, wrap: str) -> None:
    state: dict[str, object] = dict(net.state_dict())
    if wrap in ("DataParallel's", "both"):
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    if wrap in ("training script's", "both"):
        state = {"epoch": 3, "state_dict": state}
    torch.save(state, tmp_path / "w.pth.tar")
    other = Net()
    load_weights(other, tmp_path / "w.pth.tar", "the net")
    assert torch.equal(other.conv.weight, net.conv.weight)


def test_half_precision_is_widened_and_counters_may_be_missing(tmp_path: Path, net: Net) -> None:
    state = {name: t for name, t in net.state_dict().items() if "num_batches" not in name}
    save_file({name: t.half() for name, t in state.items()}, tmp_path / "w.safetensors")
    other = Net()
    load_weights(other, tmp_path / "w.safetensors", "the net")
    assert other.conv.weight.dtype == torch.float32
    assert torch.equal(other.conv.weight, net.conv.weight.half().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": torch.zeros(1)}, "w.safetensors: the net does not have extra$"),
        ({"conv.bias": None}, "w.safetensors: the net misses weights for conv.bias$"),
        ({"conv.bias": torch.zeros(5)}, "the net has another shape for conv.bias$"),
        ({"conv.bias": torch.zeros(4).int()}, "the net has another dtype for conv.bias$"),
        ({"norm.running_mean": None}, "misses weights for norm.running_mean$"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, net: Net, change: dict[str, Tensor | None], message: str
) -> None:
    changed = {**net.state_dict(), **change}
    state = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InvalidInput, match=message):
        load_weights(Net(), tmp_path / "w.safetensors", "the net")


def _folder(tmp_path: Path, factory: str = "Renaming") -> Path:
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"width": 64, "unused": [1]}))
    save_file(nn.Sequential(nn.Linear(64, 64)).state_dict(), folder / "x.safetensors")
    linear = nn.Linear(64, 64).state_dict()
    state = {f"dense.{name}": tensor for name, tensor in linear.items()}
    save_file(state, folder / "model.safetensors")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        [model]
        name = "net"
        factory = "tests.test_weights:{factory}"
        weights = "{folder}"
        inputs = [{{ name = "x", shape = [1, 64] }}]
        [dkm]
        epochs = 0
        [compression]
        small_layer_size = 0
        rules = [{{ bits = 8 }}]
        """
    )
    return recipe


def test_a_folder_gives_config_and_weights(tmp_path: Path) -> None:
    recipe = load_recipe(_folder(tmp_path))
    model, _ = run_recipe(recipe, lambda *_: None)
    # the checkpoint needs neither the folder nor its config
    assert model.source.arguments == {"config": {"width": 64, "unused": [1]}}
    torch.manual_seed(0)
    state = model.build().state_dict()
    assert state.keys() == {"body.weight", "body.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: No such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "holds no JSON object"),
        (lambda folder: (folder / "config.json").write_text("{}"), "failed: KeyError: 'width'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: no such file"),
        (
            lambda folder: (folder / "x.safetensors").rename(folder / "model.safetensors"),
            "does not have 0.bias, 0.weight$",
        ),
    ],
)
def test_a_folder_that_is_not_right_is_named(
    tmp_path: Path, break_it: object, message: str
) -> None:
    recipe = _folder(tmp_path)
    assert callable(break_it)
    break_it(tmp_path / "encoder")
    with pytest.raises(InvalidInput, match=message):
        run_recipe(load_recipe(recipe), lambda *_: None)


def test_a_model_that_cannot_adapt_is_named(tmp_path: Path) -> None:
    recipe = load_recipe(_folder(tmp_path, "Broken"))
    with pytest.raises(InvalidInput, match=r"adapt_state of the model of .* failed: KeyError"):
        run_recipe(recipe, lambda *_: None)


def test_a_config_that_nests_without_end_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(InvalidInput, match="not JSON"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("resnet18_imagenet", (), "resnet18.pth: no such file: name yours with model.weights"),
        ("resnet18_imagenet", ("model.weights=w.safetensors",), "misses weights for bn1.bias"),
        (
            "glyphs",
            ("task.factory=dkm_models.imagefolder:ImageFolder", "task.arguments.root=photos"),
            "photos: no such folder: name the one that holds train and val",
        ),
        ("distilbert_glue", (), "distilbert/config.json: No such file or directory: name a folder"),
    ],
)
def test_what_a_recipe_lacks_is_named_with_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    settings: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"fc.bias": torch.zeros(1000)}, "w.safetensors")
    options = [part for setting in settings for part in ("--set", setting)]
    assert main(["compress", recipe, "-o", "run", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dkm: error: ")
    assert message in line
    assert not (tmp_path / "run").exists()
