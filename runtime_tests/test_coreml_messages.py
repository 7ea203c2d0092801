"""What of coremltools' messages a user is told."""

from __future__ import annotations

import logging
import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from dkm_export.errors import DkmWarning

ct = pytest.importorskip("coremltools")

from dkm_exporters.mlprogram.messages import model_warnings  # noqa: E402 needs coremltools


class Divides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / torch.zeros(4)


class Clamps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0.5) + torch.arange(4)


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4, padding_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.table(x.int())
        return y


def convert(module: nn.Module, name: str = "x") -> list[str]:
    """What is said when a module is converted that takes four numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module.eval(), (torch.ones(1, 4),)).run_decompositions({})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with model_warnings("coreml"):
            ct.convert(
                program,
                inputs=[ct.TensorType(name, (1, 4))],
                minimum_deployment_target=ct.target.iOS18,
                skip_model_load=True,
            )
    assert all(entry.category is DkmWarning for entry in said)
    return [str(entry.message) for entry in said]


def test_a_real_warning_is_told() -> None:
    assert convert(Divides()) == ["coreml: coremltools says: divide by zero encountered in divide"]


@pytest.mark.parametrize(
    ("module", "name"), [(Clamps(), "x"), (Embeds(), "x"), (Clamps(), "tensor")]
)
def test_noise_is_not(module: nn.Module, name: str) -> None:
    assert convert(module, name) == []


def test_the_noise_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dkm_exporters.mlprogram.messages._HARMLESS", re.compile("(?!)"))
    said = "\n".join(convert(Clamps(), "tensor") + convert(Embeds()))
    for text in ("overflow encountered", "Saving value type", "renamed", "layer does not support"):
        assert text in said


def test_each_message_is_one_line_and_told_once() -> None:
    logger = logging.getLogger("coremltools")
    handlers = list(logger.handlers)

    @model_warnings("coreml")
    def say() -> None:
        for _ in range(2):
            logger.warning("first %s\n  second", "line")
        logger.info("hidden")
        warnings.warn("of another library", UserWarning, stacklevel=1)

    with pytest.warns(DkmWarning) as said:
        say()
    assert [str(entry.message) for entry in said] == ["coreml: coremltools says: first line second"]
    assert logger.handlers == handlers


def test_an_error_comes_alone() -> None:
    @model_warnings("coreml")
    def fail() -> None:
        logging.getLogger("coremltools").warning("something")
        raise ValueError("wrong")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="wrong"):
            fail()
