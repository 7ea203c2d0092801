from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dkm_export.checkpoint import load_checkpoint, save_checkpoint
from dkm_export.compress import finalize, prepare
from dkm_export.errors import InvalidInput
from dkm_export.folding import fold_before_training
from dkm_export.palettized import ModelSource, PalettizedModel
from dkm_export.spec import CompressionSpec, LayerRule
from tests.zoo import IMAGE, convolutions, palettize

NAME = "stem.0.weight"


@pytest.fixture(scope="module")
def model() -> PalettizedModel:
    return palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=3, dim=2))


@pytest.fixture
def file(model: PalettizedModel, tmp_path: Path) -> Path:
    path = tmp_path / "model.dkm.safetensors"
    save_checkpoint(model, path)
    return path


def test_round_trip_and_same_bytes(model: PalettizedModel, file: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(file)
    assert (loaded.source, loaded.spec) == (model.source, model.spec)
    for name, palette in model.palettes.items():
        assert palette.difference(loaded.palettes[name]) is None
    for name, tensor in model.dense.items():
        assert torch.equal(tensor, loaded.dense[name])
    again = tmp_path / "again.dkm.safetensors"
    save_checkpoint(loaded, again)
    assert again.read_bytes() == file.read_bytes()


def test_folded_batch_norm_survives_the_round_trip(tmp_path: Path) -> None:
    module, path = convolutions(), tmp_path / "model.dkm.safetensors"
    source = ModelSource(
        name="net",
        factory="tests.zoo:convolutions",
        inputs=IMAGE,
        batch_norm="fold-before-training",
    )
    fold_before_training(module, source.example_inputs())
    prepare(module, CompressionSpec(rules=(LayerRule(bits=4),)))
    save_checkpoint(finalize(module, source), path)
    loaded = load_checkpoint(path)
    assert loaded.source.batch_norm == "fold-before-training"
    assert not any("running" in name for name in loaded.dense)
    inputs = source.example_inputs()
    assert torch.equal(loaded.build()(*inputs), module.eval()(*inputs))


def test_a_checkpoint_that_says_nothing_of_batch_norm_has_it_separate(
    model: PalettizedModel, file: Path
) -> None:
    _rewrite(file, lambda header, tensors: header["source"].pop("batch_norm"))
    loaded = load_checkpoint(file)
    assert loaded.source == model.source
    assert loaded.build().state_dict().keys() == model.build().state_dict().keys()


def test_a_checkpoint_whose_tensors_are_not_folded(file: Path) -> None:
    _rewrite(file, lambda h, t: h["source"].update(batch_norm="fold-before-training"))
    _rewrite(file, lambda h, t: t.pop("stem.1.running_mean"))
    with pytest.raises(InvalidInput, match=r"does not have stem.1.bias, stem.1.num_batches"):
        load_checkpoint(file).build()


def test_an_existing_file_needs_force(model: PalettizedModel, file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(InvalidInput, match="--force"):
        save_checkpoint(model, file)
    assert file.read_bytes() == before
    save_checkpoint(model, file, force=True)


def test_every_truncation_is_refused(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    for length in [0, 4, 8, 100, len(data) // 2, len(data) - 1]:
        cut = tmp_path / "cut.dkm.safetensors"
        cut.write_bytes(data[:length])
        with pytest.raises(InvalidInput, match="cut short"):
            load_checkpoint(cut)


def _rewrite(
    file: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
) -> None:
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["dkm"])
        tensors = {name: opened.get_tensor(name) for name in opened.offset_keys()}
    change(header, tensors)
    save_file(tensors, file, {"dkm": json.dumps(header)})


def _layer(**values: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda header, tensors: header["layers"][NAME].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_layer(bits=9), "'layers.stem.0.weight.bits': Input should be less than or equal to 8"),
        (_layer(bits=4), "stem.0.weight: 648 indices of 4 bits need 324 bytes, not 243"),
        (_layer(shape=[10**9, 10**9]), "stem.0.weight: .* need .* bytes, not 243"),
        (_layer(shape=[10**4000]), "'layers.stem.0.weight.shape.0'"),
        (_layer(shape=[]), "no values"),
        (_layer(axis=7), "axis 7 is not in 0..3"),
        (_layer(dim=64), "bytes, not 243"),
        (_layer(groups=2), "stem.0.weight: LUT is float16.1, 8, 2., expected float16.2, 8, 2."),
        (lambda h, t: h.update(schema_version=2), "'schema_version'"),
        (lambda h, t: h.update(extra=1), "'extra': unknown key, allowed: schema_version"),
        (lambda h, t: h["source"].update(name="../up"), "'source.name'"),
        (lambda h, t: t.pop(f"{NAME}.lut"), "tensor 'stem.0.weight.lut' is missing"),
        (lambda h, t: t.update({f"{NAME}.lut": torch.zeros(1, 8, 2)}), "LUT is torch.float32"),
    ],
)
def test_contradictions_are_refused(
    file: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], message: str
) -> None:
    _rewrite(file, change)
    with pytest.raises(InvalidInput, match=message):
        load_checkpoint(file)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(InvalidInput, match="did not write it"):
        load_checkpoint(path)
    with pytest.raises(InvalidInput, match="no such checkpoint"):
        load_checkpoint(tmp_path / "missing")


def test_build_names_keys_that_do_not_match(model: PalettizedModel) -> None:
    dense = dict(model.dense)
    dense.pop("head.bias")
    broken = PalettizedModel(model.source, model.spec, model.palettes, dense)
    with pytest.raises(InvalidInput, match=r"misses weights for head.bias"):
        broken.build()
    dense = dict(model.dense) | {"head.bias": torch.zeros(3)}
    broken = PalettizedModel(model.source, model.spec, model.palettes, dense)
    with pytest.raises(InvalidInput, match=r"has another shape for head.bias"):
        broken.build()


def test_fp32_bytes(model: PalettizedModel) -> None:
    state = model.build().state_dict()
    assert model.fp32_bytes == sum(tensor.nbytes for tensor in state.values())
    assert np.prod(model.palettes[NAME].layout.shape) == state[NAME].numel()
