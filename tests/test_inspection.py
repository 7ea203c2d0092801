from __future__ import annotations

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dkm_export import inspection
from dkm_export.checkpoint import save_checkpoint
from dkm_export.cli.main import main
from dkm_export.comparison import SAME, compare
from dkm_export.errors import InvalidInput
from dkm_export.exporting import Description, Exporter, NoOptions, StoredTensor
from dkm_export.exporting.description import distinct, stored_palette
from dkm_export.inspection import Inspection, inspect
from dkm_export.palette import Palette
from dkm_export.palettized import PalettizedModel
from dkm_export.sizing import account
from dkm_export.spec import LayerRule
from tests.zoo import IMAGE, palettize

LAYER = "line.weight"


@pytest.fixture(scope="module")
def model() -> PalettizedModel:
    rules = (LayerRule(bits=4), LayerRule(pattern="head.weight", bits=2, dim=2))
    return palettize("tests.zoo:convolutions", IMAGE, *rules)


@pytest.fixture(scope="module")
def checkpoint(model: PalettizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspection") / "model.dkm.safetensors"
    save_checkpoint(model, path)
    return path


def saved(model: PalettizedModel, folder: Path) -> Path:
    save_checkpoint(model, folder / "other.dkm.safetensors")
    return folder / "other.dkm.safetensors"


def with_palette(model: PalettizedModel, palette: Palette) -> PalettizedModel:
    """The model with another palette for `LAYER`."""
    return replace(model, palettes={**model.palettes, LAYER: palette})


class Packages(Exporter[NoOptions]):
    """A target of somebody else's, with folders, that says nothing but its palettes."""

    target, suffix, packages, options = "theirs", ".theirs", (), NoOptions
    palettes: dict[str, Palette]

    def lower(self, *_: Any) -> Path:
        raise NotImplementedError

    def read_palettes(self, artifact: Path) -> dict[str, Palette]:
        return self.palettes


@pytest.fixture
def package(
    model: PalettizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Packages]:
    exporter = Packages()
    exporter.palettes = {LAYER: model.palettes[LAYER]}
    monkeypatch.setattr(inspection, "discover", lambda group: {"theirs": exporter})
    artifact = tmp_path / "net.theirs"
    (artifact / "weights").mkdir(parents=True)
    (artifact / "graph").write_bytes(b"graph " * 500)
    (artifact / "weights" / "all").write_bytes(np.random.default_rng(0).bytes(5000))
    return artifact, exporter


def test_every_byte_of_a_checkpoint_is_of_some_kind(
    model: PalettizedModel, checkpoint: Path
) -> None:
    found = inspect(checkpoint)
    assert sum(found.totals.values()) == found.bytes == checkpoint.stat().st_size
    palettes = model.palettes.values()
    assert found.totals["indices and quantized values"] == sum(p.packed.nbytes for p in palettes)
    assert found.totals["LUTs"] == sum(p.lut.nbytes for p in palettes)
    assert found.totals["dense tensors"] == sum(x.nbytes for x in model.dense.values())
    assert found.account is not None
    assert found.account.paper == account(model).paper
    assert [x.nbytes for x in found.dense] == sorted((x.nbytes for x in found.dense), reverse=True)


def test_the_download_is_as_large_as_the_zip_of_all_files(
    package: tuple[Path, Packages], tmp_path: Path
) -> None:
    artifact, _ = package
    found = inspect(artifact)
    with zipfile.ZipFile(
        tmp_path / "net.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9
    ) as archive:
        for name in ("graph", "weights/all"):
            archive.write(artifact / name, f"{artifact.name}/{name}")
    # which goes back to write sizes in front of each file, where a stream writes them behind it
    assert found.zipped() == (tmp_path / "net.zip").stat().st_size + 2 * 16
    assert 5000 < found.zipped() < found.bytes


def test_a_file_s_name_need_not_be_text(package: tuple[Path, Packages]) -> None:
    artifact, _ = package
    before = inspect(artifact).zipped()
    (artifact / os.fsdecode(b"net\xff")).write_bytes(b"")
    assert inspect(artifact).zipped() > before


def test_a_target_need_not_say_more_than_its_palettes(package: tuple[Path, Packages]) -> None:
    artifact, exporter = package
    found = inspect(artifact)
    assert [layer.name for layer in found.layers] == [LAYER]
    assert found.account is None, "nobody knows what else there is"
    assert found.totals["not taken apart"] == found.bytes - exporter.palettes[LAYER].nbytes
    assert found.totals["graph, names, headers"] == 0


def test_more_bytes_than_there_are_is_refused(
    package: tuple[Path, Packages], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, exporter = package
    tensor = StoredTensor("huge", (1 << 40,), "uint8", value_bytes=1 << 40)
    describe = lambda artifact: Description(exporter.files(artifact), [tensor])  # noqa: E731
    monkeypatch.setattr(exporter, "describe", describe)
    with pytest.raises(InvalidInput, match=r"net\.theirs: claims to hold more bytes"):
        inspect(artifact)


def test_a_link_out_of_a_package_is_refused_before_it_is_read(
    package: tuple[Path, Packages], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, exporter = package
    (artifact / "inside").symlink_to(artifact / "graph")
    inspect(artifact)
    (artifact / "outside").symlink_to("/etc/hostname")
    monkeypatch.setattr(exporter, "describe", lambda artifact: pytest.fail("was read"))
    with pytest.raises(InvalidInput, match="'outside' leads out of its folder"):
        inspect(artifact)


def test_a_repeated_name_gets_a_number() -> None:
    names = ["a", "b", "a", "a (2)", "a"]
    tensors = distinct(StoredTensor(name, (), "float32") for name in names)
    assert [tensor.name for tensor in tensors] == ["a", "b", "a (2)", "a (2) (2)", "a (3)"]


def test_nothing_differs_from_itself(checkpoint: Path) -> None:
    changes = compare(inspect(checkpoint), inspect(checkpoint))
    assert {change.palette for change in changes if change.is_layer} == {SAME}
    assert not any(change.changed for change in changes)


def test_one_changed_entry_is_the_only_difference(
    model: PalettizedModel, checkpoint: Path, tmp_path: Path
) -> None:
    palette = model.palettes[LAYER]
    lut = palette.lut.copy()
    lut[0, 3] += np.float16(0.5)
    other = saved(with_palette(model, replace(palette, lut=lut)), tmp_path)
    changes = compare(inspect(checkpoint), inspect(other))
    assert {change.name: change.palette for change in changes if change.changed} == {
        LAYER: "1 of 16 LUT entries differ"
    }


def test_other_bits_are_told_in_words(
    model: PalettizedModel, checkpoint: Path, tmp_path: Path
) -> None:
    palette = model.palettes[LAYER]
    three = Palette(3, palette.layout, palette.lut[:, :8], palette.indices % 8)
    (change,) = (
        change
        for change in compare(
            inspect(checkpoint), inspect(saved(with_palette(model, three), tmp_path))
        )
        if change.changed
    )
    size = palette.layout.vectors
    assert change.palette is None
    assert change.differences == (
        "bits 3 instead of 4",
        f"values {size * 3 // 8:,} B instead of {size // 2:,} B",
        "LUT 16 B instead of 32 B",
    )


def test_the_difference_is_shown_and_is_no_failure(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = (LayerRule(pattern="line.weight", bits=3), LayerRule(pattern="head.weight", bits=2))
    other = saved(palettize("tests.zoo:convolutions", IMAGE, *small), tmp_path)
    assert main(["inspect", str(checkpoint), "--diff", str(other)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("line.weight") and "bits 3 instead of 4" in line for line in lines)
    dense = "encoding float32 instead of palette"
    assert any(line.startswith("up.weight") and dense in line for line in lines)
    assert main(["inspect", str(checkpoint), "--diff", str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["changes"][LAYER]["before"]["bits"] == 4
    assert found["changes"][LAYER]["after"]["bits"] == 3
    assert [totals["bytes"] for totals in found["totals"]] == [
        path.stat().st_size for path in (checkpoint, other)
    ]
    assert main(["inspect", str(checkpoint), "--diff", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changes"] == {}


def test_dense_values_of_checkpoints_are_compared(
    model: PalettizedModel, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *others = (key for key, tensor in model.dense.items() if tensor.is_floating_point())
    dense = {**model.dense, name: model.dense[name] + 1}
    other = saved(replace(model, dense=dense), tmp_path)
    assert main(["inspect", str(checkpoint), "--diff", str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {key: x["differences"] for key, x in found["changes"].items()} == {
        name: ["values differ"]
    }
    assert {LAYER, *others} <= set(found["identical"])
    assert found["values_not_compared"] == []


def test_what_is_not_compared_is_not_called_identical(
    model: PalettizedModel,
    package: tuple[Path, Packages],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact, exporter = package
    plain = model.palettes[LAYER]
    one, two = (replace(plain, scale=np.full((1, 1), x, np.float32)) for x in (1, 2))
    before, after = ({"same": one, "unknown": plain, "other": other} for other in (one, two))
    tensors = [stored_palette(name, palette, scale_bytes=4) for name, palette in before.items()]
    tensors += [StoredTensor("bias", (2,), "float32", value_bytes=8)]
    tensors += [StoredTensor("line.int8", (2,), "int8 per channel", 8, value_bytes=2)]
    sides = [Description(exporter.files(artifact), tensors, each) for each in (before, after)]
    described = iter(2 * sides)
    monkeypatch.setattr(exporter, "describe", lambda artifact: next(described))
    for options in ([], ["--json"]):
        assert main(["inspect", str(artifact), "--diff", str(artifact), *options]) == 0
    lines, brace, document = capsys.readouterr().out.partition("{")
    found = json.loads(brace + document)
    assert {key: x["differences"] for key, x in found["changes"].items()} == {
        "other": ["scales differ"]
    }
    assert found["identical"] == ["same"]
    assert found["values_not_compared"] == ["unknown", "bias", "line.int8"]
    for line in (
        "layers without a difference: 1",
        "layers alike, but values not compared: 2",
        "dense tensors without a difference: 0",
        "dense tensors alike, but values not compared: 1",
    ):
        assert line in lines.splitlines()


def test_names_do_not_control_the_terminal(
    package: tuple[Path, Packages],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact, exporter = package
    tensor = StoredTensor("a\x1b[2Jb", (), "float32", reason="why\n\x07")
    unread = {"data\x1b[2J\nfile: 1 B": 12}
    describe = lambda artifact: Description(  # noqa: E731
        exporter.files(artifact), [tensor], unread=unread
    )
    monkeypatch.setattr(exporter, "describe", describe)
    assert main(["inspect", str(artifact)]) == 0
    out = capsys.readouterr().out
    assert "a?[2Jb" in out
    assert "not taken apart: data?[2J?file: 1 B, 12 B" in out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert main(["inspect", str(artifact), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_taken_apart"] == unread


def test_only_what_is_elsewhere_is_said_to_be_in_another_file(
    package: tuple[Path, Packages],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact, exporter = package
    unread = {"empty": 0, "constants": None}
    describe = lambda artifact: Description(exporter.files(artifact), [], unread=unread)  # noqa: E731
    monkeypatch.setattr(exporter, "describe", describe)
    assert main(["inspect", str(artifact)]) == 0
    out = capsys.readouterr().out
    assert "not taken apart: empty, 0 B" in out
    assert "not taken apart: constants, in another file" in out
    assert main(["inspect", str(artifact), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_taken_apart"] == unread


def test_totals_are_printed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["bytes_by_kind"].values()) == found["bytes"]
    assert 0 < found["zipped_bytes"] < found["bytes"]
    assert found["layers"]["head.weight"] == {
        "shape": [24, 48],
        "encoding": "palette",
        "bits": 2,
        "dim": 2,
        "axis": 0,
        "groups": 1,
        "index_bytes": 144,
        "lut_bytes": 16,
        "scale_bytes": 0,
        "reason": "",
    }
    assert main(["inspect", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert f"file: {found['bytes']:,} B" in out
    assert f"zipped: {found['zipped_bytes']:,} B" in out
    assert f"by the DKM paper's convention: {found['paper_bytes']:,} B" in out


def test_the_paper_convention_needs_to_know_everything(checkpoint: Path) -> None:
    found = inspect(checkpoint)
    unread = replace(found.description, unread={"a delegate": 1})
    assert Inspection(checkpoint, unread).account is None
    foreign = StoredTensor("int8", (4, 4), "int8 per channel", 8, value_bytes=16)
    more = replace(found.description, tensors=[*found.description.tensors, foreign])
    assert Inspection(checkpoint, more).account is None
