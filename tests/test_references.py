from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dkm_export.errors import InvalidInput
from dkm_export.references import TaskSource, build_module
from dkm_export.task import Split, batches_of, metric_of
from dkm_models.digits import Digits


def not_annotated():  # type: ignore[no-untyped-def]
    return nn.Linear(2, 2)


def wrong() -> nn.Module:
    return "no module"  # type: ignore[return-value]


def broken() -> nn.Module:
    raise ValueError("out of luck")


def test_a_class_and_an_annotated_function_are_factories() -> None:
    assert isinstance(
        build_module("torch.nn:Linear", {"in_features": 2, "out_features": 3}), nn.Linear
    )
    assert isinstance(build_module("dkm_models.digits:digits_cnn", {}), nn.Module)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("os:system", "neither an nn.Module class nor a function annotated"),
        ("subprocess:run", "neither an nn.Module class nor a function annotated"),
        ("tests.test_references:not_annotated", "add the annotation"),
        ("tests.test_references:wrong", "returned str"),
        ("tests.test_references:broken", "failed: ValueError: out of luck"),
        ("no_such_package.models:net", "does not import: ModuleNotFoundError: .*'no_such"),
        ("torch.nn:Lineal", "module 'torch.nn' has no 'Lineal'"),
        ("torch.nn", "write package.module:object"),
    ],
)
def test_anything_else_is_not(reference: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        build_module(reference, {})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def net(:", "does not import: SyntaxError"),
        ("raise SystemExit(0)", "does not import: SystemExit"),
        ("raise AttributeError('x')", "does not import: AttributeError: x"),
        ("def net() -> 1 + 'a': ...", "does not import: TypeError"),
        (
            "from __future__ import annotations\ndef net() -> nn.Modul: ...",
            "do not resolve: NameError: .*'nn'",
        ),
    ],
)
def test_a_module_of_the_user_s_may_be_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"broken_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    with pytest.raises(InvalidInput, match=message):
        build_module(f"{name}:net", {})


class Nameless(Digits):
    metric_name = None  # type: ignore[assignment]


def test_tasks() -> None:
    assert TaskSource(factory="dkm_models.digits:Digits").load().metric_name == "top-1 %"
    with pytest.raises(InvalidInput, match="not a subclass of"):
        TaskSource(factory="dkm_models.digits:digits_cnn").load()
    with pytest.raises(InvalidInput, match="has no metric_name"):
        TaskSource(factory="tests.test_references:Nameless").load()


class Wrong(Digits):
    """Yields and returns whatever it is told."""

    found: list[Any]
    value: Any

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Any]:
        yield from self.found

    def metric(self, output: Tensor, target: Tensor) -> Any:
        return self.value


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "'test' batches are none"),
        ([torch.zeros(2)], r"are not \(\(input, ...\), target\), all tensors"),
        ([((torch.zeros(2),), torch.tensor(1))], "all tensors with a batch axis"),
        ([((1,), torch.zeros(2))], r"are not \(\(input, ...\), target\), all tensors"),
        (None, "'test' batches failed: TypeError"),
    ],
)
def test_batches_of_a_wrong_task(found: list[Any], message: str) -> None:
    task = Wrong()
    task.found = found
    with pytest.raises(InvalidInput, match=message):
        list(batches_of(task, "test", 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, None, torch.tensor(1.0), "99"])
def test_a_metric_is_a_finite_number(value: Any) -> None:
    task = Wrong()
    task.value = value
    with pytest.raises(InvalidInput, match=r"its metric is .*, not a finite number"):
        metric_of(task, torch.zeros(1), torch.zeros(1))
