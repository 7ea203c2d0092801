from __future__ import annotations

import pytest
from pydantic import ValidationError
from torch import nn

from dkm_export.errors import InvalidInput
from dkm_export.layers import kind_of, plan
from dkm_export.spec import CompressionSpec, LayerKind, LayerRule
from tests.zoo import Convolutions


def test_last_match_wins_and_small_layers_get_8_bits() -> None:
    spec = CompressionSpec(
        rules=(
            LayerRule(bits=4, dim=4),
            LayerRule(kinds=(LayerKind.LINEAR,), bits=2),
            LayerRule(pattern="head.*", skip=True),
        )
    )
    chosen = spec.rule_for("body.weight", LayerKind.LINEAR, 20_000)
    assert chosen is not None
    assert (chosen.bits, chosen.dim) == (2, 1)
    small = spec.rule_for("stem.weight", LayerKind.CONV, 9_999)
    assert small is not None
    assert (small.bits, small.dim) == (8, 1)
    assert spec.rule_for("head.weight", LayerKind.LINEAR, 20_000) is None
    assert CompressionSpec(rules=()).rule_for("a.weight", LayerKind.CONV, 20_000) is None


@pytest.mark.parametrize(
    "rule", [{}, {"bits": 4, "skip": True}, {"bits": 9}, {"bits": 4, "bit": 4}]
)
def test_wrong_rules_are_refused(rule: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LayerRule.model_validate(rule)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Conv2d(4, 8, 3), LayerKind.CONV),
        (nn.Conv1d(4, 8, 3, groups=2), LayerKind.CONV),
        (nn.Conv2d(4, 8, 3, groups=4), LayerKind.DEPTHWISE),
        (nn.Conv2d(1, 8, 3), LayerKind.CONV),
        (nn.ConvTranspose2d(4, 8, 3), LayerKind.CONV_TRANSPOSE),
        (nn.Linear(4, 8), LayerKind.LINEAR),
        (nn.Embedding(4, 8), LayerKind.EMBEDDING),
        (nn.BatchNorm2d(4), None),
    ],
)
def test_kinds(layer: nn.Module, kind: LayerKind | None) -> None:
    assert kind_of(layer) is kind


def test_plan_says_why_a_layer_stays_dense() -> None:
    spec = CompressionSpec(rules=(LayerRule(kinds=(LayerKind.CONV,), bits=8),))
    plans = {entry.name: entry for entry in plan(Convolutions(), spec)}
    assert plans["head.weight"].reason == "no rule asks for a palette"
    assert plans["stem.0.weight"].bits == 8
    one = plan(nn.Conv2d(1, 8, 3), CompressionSpec(rules=(LayerRule(bits=8),)))
    assert one[0].reason == "a palette would be no smaller than float16"


def test_plan_refuses_a_pattern_that_matches_nothing() -> None:
    spec = CompressionSpec(rules=(LayerRule(pattern="stem.1.*", bits=4),))
    with pytest.raises(InvalidInput, match=r"rule 1: pattern 'stem.1.\*' matches no layer.*stem.0"):
        plan(Convolutions(), spec)


def test_plan_of_tied_weights_and_bad_layouts() -> None:
    tied = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    tied[1].weight = tied[0].weight
    rules = (LayerRule(bits=2),)
    spec = CompressionSpec(rules=rules, small_layer_size=0)
    shared = nn.Linear(32, 32)
    for model in (tied, nn.Sequential(shared, shared)):
        first, second = plan(model, spec)
        assert (first.tied_to, second.tied_to) == ("", "0.weight")
        assert (first.nbytes, second.nbytes) == (264, 0)
    one_skipped = CompressionSpec(
        rules=(*rules, LayerRule(pattern="1.*", skip=True)), small_layer_size=0
    )
    with pytest.raises(InvalidInput, match=r"0.weight and 1.weight are one tied weight"):
        plan(tied, one_skipped)
    odd = CompressionSpec(rules=(LayerRule(bits=2, groups=3),), small_layer_size=0)
    with pytest.raises(InvalidInput, match=r"weight: groups 3 does not divide axis 0"):
        plan(nn.Linear(32, 32), odd)
