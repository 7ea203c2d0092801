"""Every target stores a shared weight once, and runs it in all the places where it is used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dkm_export.checkpoint import save_checkpoint
from dkm_export.cli.main import main
from dkm_export.palettized import InputSpec
from dkm_export.spec import LayerRule
from tests.compiler import needs_compiler
from tests.zoo import IMAGE, TOKENS, lively, palettize

HERE = "runtime_tests.test_ties"
RUNTIMES = "onnxruntime,executorch,executorch-runner,coreml-reference"
pytestmark = needs_compiler


class Normed(nn.Module):
    """Two convolutions of one weight, each with a batch norm that nothing can fold into it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.first, self.second = nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3)
        self.second.weight = self.first.weight
        self.first_norm, self.second_norm = nn.BatchNorm2d(32), nn.BatchNorm2d(32)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.first_norm(self.first(self.stem(image))))
        y: Tensor = self.second_norm(self.second(x)).mean((2, 3))
        return y


class Lent(Normed):
    """A weight that only its second layer uses, so that its batch norm can be folded."""

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.second_norm(self.second(self.stem(image))).mean((2, 3))
        return y


def normed() -> nn.Module:
    return lively(Normed())


def lent() -> nn.Module:
    return lively(Lent())


@pytest.mark.parametrize(
    ("factory", "builder", "inputs"),
    [
        ("tests.zoo:tied", "tests.zoo:tied", TOKENS),
        ("tests.zoo:tied", "tests.zoo:untied", TOKENS),
        (f"{HERE}:normed", f"{HERE}:normed", IMAGE),
        (f"{HERE}:lent", f"{HERE}:lent", IMAGE),
    ],
)
def test_every_target_holds_and_runs_tied_weights(
    factory: str,
    builder: str,
    inputs: tuple[InputSpec, ...],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = palettize(factory, inputs, LayerRule(bits=4))
    assert model.ties
    model = replace(model, source=model.source.model_copy(update={"factory": builder}))
    save_checkpoint(model, tmp_path / "model.dkm.safetensors")
    out = str(tmp_path / "out")
    assert main(["export", "--target", "all", str(tmp_path), "-o", out, "-q"]) == 0
    capfd.readouterr()
    code = main(["check", out, "--require", RUNTIMES, "--json"])
    report = json.loads(capfd.readouterr().out)
    assert code == 0, report
    largest = max(4 * palette.layout.size for palette in model.palettes.values())
    for artifact in report["artifacts"]:
        # so none of it is dense; an .ort has more bytes of graph than these networks have weights
        assert artifact["bytes"] < largest or artifact["target"] == "ort"
