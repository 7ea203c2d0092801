from __future__ import annotations

import pytest
from torch import nn

from dkm_export.errors import InvalidInput
from dkm_export.references import build_module, load_task


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
        ("no_such_package.models:net", "does not import: No module named 'no_such_package'"),
        ("torch.nn:Lineal", "module 'torch.nn' has no 'Lineal'"),
        ("torch.nn", "write package.module:object"),
    ],
)
def test_anything_else_is_not(reference: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        build_module(reference, {})


def test_tasks() -> None:
    assert load_task("dkm_models.digits:Digits").metric_name == "top-1 %"
    with pytest.raises(InvalidInput, match="not a subclass of"):
        load_task("dkm_models.digits:digits_cnn")
