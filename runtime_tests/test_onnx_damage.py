"""Damaged ONNX files: what changed is seen, what is malformed is refused, nothing crashes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.palettized import PalettizedModel
from dkm_export.spec import LayerRule
from dkm_exporters.onnx import OnnxExporter, OnnxOptions
from dkm_runtimes.onnxruntime import OnnxRuntime
from tests.zoo import IMAGE, palettize


@pytest.fixture(scope="module")
def model() -> PalettizedModel:
    rules = (LayerRule(bits=4), LayerRule(pattern="head.weight", bits=3, dim=2))
    return palettize("tests.zoo:convolutions", IMAGE, *rules)


@pytest.fixture(scope="module")
def artifact(model: PalettizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    return OnnxExporter().lower(model, model.build(), folder, OnnxOptions())


def edited(artifact: Path, folder: Path, edit: Callable[[onnx.ModelProto], object]) -> Path:
    proto = onnx.load(artifact)
    edit(proto)
    path = folder / "edited.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def initializer(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    tensor: onnx.TensorProto
    (tensor,) = [tensor for tensor in proto.graph.initializer if tensor.name == name]
    return tensor


def test_a_changed_lut_entry_is_found_in_its_layer(
    model: PalettizedModel, artifact: Path, tmp_path: Path
) -> None:
    def flip(proto: onnx.ModelProto) -> None:
        tensor = initializer(proto, "line.weight.lut")
        tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]

    found = OnnxExporter().read_palettes(edited(artifact, tmp_path, flip))
    differing = {name: p.difference(found[name]) for name, p in model.palettes.items()}
    assert differing.pop("line.weight") == "1 of 16 LUT entries differ"
    assert set(differing.values()) == {None}


def rename(proto: onnx.ModelProto) -> None:
    initializer(proto, "up.weight.lut").name = "up.weight.indices"


def move_out(proto: onnx.ModelProto) -> None:
    tensor = initializer(proto, "up.weight.indices")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret")


def table(old: str, new: str) -> Callable[[onnx.ModelProto], object]:
    def edit(proto: onnx.ModelProto) -> None:
        (entry,) = proto.metadata_props
        assert old in entry.value
        entry.value = entry.value.replace(old, new)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda proto: proto.ClearField("metadata_props"), "no 'dkm' metadata"),
        (lambda proto: proto.ClearField("graph"), "'stem.0.weight.lut' is missing"),
        (rename, "two initializers have the same name"),
        (move_out, "up.weight: initializer 'up.weight.indices' is not in edited.onnx.data"),
        (table('{"schema_version":1', '{"schema_version":2'), "schema_version"),
        (table('"layers"', '"extra":1,"layers"'), "unknown key"),
        (table('"shape":[24,48]', '"shape":[24,49]'), "head.weight: initializer"),
        (table('"shape":[24,48]', f'"shape":[24{"0" * 17},24{"0" * 17}]'), "head.weight: "),
        (table('"shape":[24,48]', f'"shape":[{"9" * 4000},{"9" * 4000}]'), "shape.0"),
        (table('"bits":3', '"bits":9'), "bits"),
        (table('"bits":3', '"bits":4'), "head.weight: initializer 'head.weight.lut'"),
        (table('"dim":2', '"dim":3'), "head.weight: initializer 'head.weight.lut'"),
        (table('"shape":[24,48]', '"shape":[]'), "head.weight: shape"),
        (
            lambda proto: initializer(proto, "head.weight.lut").dims.append(1),
            "head.weight: initializer 'head.weight.lut'",
        ),
        (
            lambda proto: setattr(initializer(proto, "head.weight.lut"), "data_type", 16),
            "head.weight: initializer 'head.weight.lut'",
        ),
        (
            lambda proto: setattr(initializer(proto, "head.weight.indices"), "raw_data", b""),
            "head.weight: initializer 'head.weight.indices'",
        ),
        (
            lambda proto: setattr(initializer(proto, "head.weight.lut"), "raw_data", b"\xff" * 32),
            "head.weight: LUT holds values that are not finite",
        ),
        (
            lambda proto: initializer(proto, "up.weight.scale").dims.reverse(),
            "up.weight: initializer 'up.weight.scale'",
        ),
    ],
)
def test_contradictions_are_refused(
    edit: Callable[[onnx.ModelProto], object], message: str, artifact: Path, tmp_path: Path
) -> None:
    path = edited(artifact, tmp_path, edit)
    with pytest.raises(InvalidInput) as caught:
        OnnxExporter().read_palettes(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_cut_files_are_refused(artifact: Path, tmp_path: Path) -> None:
    whole = artifact.read_bytes()
    path = tmp_path / "cut.onnx"
    with pytest.raises(InvalidInput, match="cannot be read"):
        OnnxExporter().read_palettes(path)
    with pytest.raises(InvalidInput, match="cannot be read"):
        OnnxExporter().read_palettes(tmp_path)
    for length in (0, 1, 100, *range(1000, len(whole), 997), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidInput, match=r"cut\.onnx"):
            OnnxExporter().read_palettes(path)


def test_damaged_files_never_crash_the_reader(artifact: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.onnx"
    for _ in range(300):
        damaged = bytearray(artifact.read_bytes())
        for position in rng.integers(0, len(damaged), 3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        with suppress(InvalidInput):
            OnnxExporter().read_palettes(path)


def unknown_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].op_type = "Unheard"


def newer_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 99


@pytest.mark.parametrize("edit", [unknown_operator, newer_opset])
def test_onnx_runtime_names_what_it_lacks(
    edit: Callable[[onnx.ModelProto], object], artifact: Path, tmp_path: Path
) -> None:
    path = edited(artifact, tmp_path, edit)
    with pytest.raises(Unsupported) as caught:
        OnnxRuntime().load(path)
    assert str(caught.value).startswith(f"{path}: ONNX Runtime {onnxruntime.__version__} ")
    assert "\n" not in str(caught.value)


def test_onnx_runtime_refuses_malformed_files(
    artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut.onnx"
    for content in (None, b"", b"garbage", artifact.read_bytes()[:5000]):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InvalidInput, match=r"cut\.onnx") as caught:
            OnnxRuntime().load(path)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
