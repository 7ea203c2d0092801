from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dkm_export import CompressionSpec, InputSpec, LayerRule, ModelSource, finalize, prepare
from dkm_export.checkpoint import load_checkpoint, save_checkpoint
from dkm_export.layers import plan
from dkm_export.sizing import Account, DenseSize, account, account_sizes, predict
from tests.zoo import Tied

SPEC = CompressionSpec(rules=(LayerRule(bits=2, dim=3),))


def _net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, bias=False),  # 9,408 weights: small
        nn.BatchNorm2d(64),
        nn.Flatten(),
        nn.Linear(64, 160),  # 10,240 weights
        nn.LayerNorm(160),
    )


def _source(name: str = "net") -> ModelSource:
    return ModelSource(
        name=name,
        factory="tests.test_sizing:_net",
        inputs=(InputSpec(name="x", shape=(1, 3, 7, 7)),),
    )


def _lines(found: Account) -> dict[str, tuple[int, int]]:
    return {line.kind: (line.paper, line.stored) for line in found.lines}


def test_every_byte_of_a_checkpoint_is_accounted_for(tmp_path: Path) -> None:
    model = _net()
    planned = predict(plan(model, SPEC), model.state_dict())
    prepare(model, SPEC)
    file = tmp_path / "net.dkm.safetensors"
    save_checkpoint(finalize(model, _source()), file)
    found = account(load_checkpoint(file), file.stat().st_size)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    vectors = -(-160 // 3) * 64  # padded along the axis
    assert _lines(found) == {
        "small layers": (9408, 9408 + 512),
        "indices": (vectors * 2 // 8, vectors * 2 // 8),
        "LUTs": (2 * 4 * 3, 2 * 4 * 3),
        "batch norm": (4 * 64, 4 * 4 * 64),
        "counters": (0, 8),
        "biases and other small tensors": (3 * 160, 4 * 3 * 160),
        "file header": (0, header),
    }
    assert found.stored == file.stat().st_size
    assert found.parameters == sum(parameter.numel() for parameter in _net().parameters())
    assert found.paper_ratio == 4 * found.parameters / found.paper
    assert planned.lines == tuple(line for line in found.lines if line.kind != "file header")


def test_a_small_layer_that_a_rule_palettizes_counts_as_what_it_is() -> None:
    spec = CompressionSpec(rules=(LayerRule(bits=2),), small_layer_size=0)
    lines = _lines(predict(plan(_net(), spec), _net().state_dict()))
    assert lines["indices"] == ((9408 + 10240) // 4, (9408 + 10240) // 4)
    assert "small layers" not in lines


def test_large_layers_without_a_palette_count_as_they_are() -> None:
    spec = CompressionSpec(rules=(LayerRule(pattern="3.weight", skip=True),))
    lines = _lines(predict(plan(_net(), spec), _net().state_dict()))
    assert lines["large dense tensors"] == (4 * 10240, 4 * 10240)


def test_a_tied_weight_counts_once() -> None:
    torch.manual_seed(0)
    spec = CompressionSpec(rules=(LayerRule(bits=4),), small_layer_size=0)
    model = Tied()
    weights = {id(p): p.numel() for p in model.parameters() if p.dim() > 1}
    planned = predict(plan(model, spec), model.state_dict())
    prepare(model, spec)
    found = account(finalize(model, _source("tied")))
    assert found == planned
    assert _lines(found)["indices"][0] == sum(weights.values()) // 2


def test_statistics_are_no_parameters_in_ml_programs_either() -> None:
    names = ("norm.weight", "norm.running_var", "norm_weight_to_fp16", "norm_running_mean_to_fp16")
    found = account_sizes([], [DenseSize(name, 64, 128, floating=True) for name in names])
    assert found.parameters == 2 * 64
    assert found.paper == 4 * 64
