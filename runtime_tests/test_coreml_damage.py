"""Damaged Core ML packages: what changed is seen, what is malformed is refused, nothing crashes."""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dkm_export.errors import DkmError, InvalidInput, Unsupported
from dkm_export.palettized import PalettizedModel
from dkm_export.spec import LayerRule
from dkm_exporters.coreml import CoreMLExporter, CoreMLOptions
from dkm_runtimes.coreml_reference import CoreMLReferenceRuntime
from tests.zoo import TOKENS, palettize

pytest.importorskip("coremltools")

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[PalettizedModel, Path]:
    """A model and its fp16 package."""
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=4))
    folder = tmp_path_factory.mktemp("tokens")
    return model, CoreMLExporter().lower(model, model.build(), folder, CoreMLOptions())


def edit_model(artifact: Path, edit: Callable[[Any], None]) -> None:
    from coremltools.proto import Model_pb2

    file = artifact / MODEL
    spec = Model_pb2.Model.FromString(file.read_bytes())
    edit(spec)
    file.write_bytes(spec.SerializeToString())


def operations(spec: Any) -> list[Any]:
    function = spec.mlProgram.functions["main"]
    return list(function.block_specializations[function.opset].operations)


def blob(spec: Any, layer: str, argument: str) -> Any:
    """The reference into weight.bin of an argument of the operation that decodes ``layer``."""
    operation = next(o for o in operations(spec) if o.outputs[0].name.startswith(f"p_{layer}"))
    return operation.inputs[argument].arguments[0].value.blobFileValue


def record(artifact: Path, layer: str = "hidden_weight", argument: str = "lut") -> int:
    """Offset of its record in weight.bin."""
    found: list[int] = []
    edit_model(artifact, lambda spec: found.append(blob(spec, layer, argument).offset))
    return found[0]


def poke(artifact: Path, offset: int, format: str, value: int) -> None:
    content = bytearray((artifact / WEIGHTS).read_bytes())
    struct.pack_into(format, content, offset, value)
    (artifact / WEIGHTS).write_bytes(content)


@pytest.mark.parametrize(("argument", "count"), [("lut", "16 LUT"), ("indices", "4608 indices")])
def test_one_changed_byte_is_seen_in_its_layer(
    argument: str, count: str, tokens: tuple[PalettizedModel, Path], tmp_path: Path
) -> None:
    model, original = tokens
    artifact = Path(shutil.copytree(original, tmp_path / original.name))
    content = (artifact / WEIGHTS).read_bytes()
    (start,) = struct.unpack_from("<Q", content, record(artifact, argument=argument) + 16)
    poke(artifact, start, "<B", content[start] ^ 1)
    palettes = CoreMLExporter().read_palettes(artifact)
    differences = {name: p.difference(palettes[name]) for name, p in model.palettes.items()}
    assert differences.pop("hidden.weight") == f"1 of {count} entries differ"
    assert not any(differences.values())
    (tokens_in,) = model.source.example_inputs()
    (changed,), (right,) = (
        CoreMLReferenceRuntime().load(path).run({"tokens": tokens_in.numpy()})
        for path in (artifact, original)
    )
    assert not np.array_equal(changed, right)


def _truncate(artifact: Path) -> None:
    content = (artifact / WEIGHTS).read_bytes()
    (artifact / WEIGHTS).write_bytes(content[:-1])


def _escape(artifact: Path, path: str) -> None:
    manifest = artifact / "Manifest.json"
    manifest.write_text(manifest.read_text().replace("com.apple.CoreML/model.mlmodel", path))


def _link(artifact: Path) -> None:
    shutil.copy(artifact / WEIGHTS, artifact.parent / "weight.bin")
    (artifact / WEIGHTS).unlink()
    (artifact / WEIGHTS).symlink_to(artifact.parent / "weight.bin")


def _set_blob(artifact: Path, **fields: Any) -> None:
    def edit(spec: Any) -> None:
        for name, value in fields.items():
            setattr(blob(spec, "hidden_weight", "lut"), name, value)

    edit_model(artifact, edit)


MALFORMED: dict[str, Callable[[Path], object]] = {
    "truncated weight.bin": _truncate,
    "empty weight.bin": lambda a: (a / WEIGHTS).write_bytes(b""),
    "weight.bin missing": lambda a: (a / WEIGHTS).unlink(),
    "weight.bin is a link out of the package": _link,
    "bad sentinel": lambda a: poke(a, record(a), "<I", 0xDEADBEEE),
    "other data type": lambda a: poke(a, record(a) + 4, "<I", 2),
    "size too small": lambda a: poke(a, record(a) + 8, "<Q", 30),
    "size beyond the file": lambda a: poke(a, record(a) + 8, "<Q", 1 << 63),
    "data beyond the file": lambda a: poke(a, record(a) + 16, "<Q", 1 << 40),
    "unused bits": lambda a: poke(a, record(a, argument="indices") + 24, "<Q", 3),
    "offset beyond the file": lambda a: _set_blob(a, offset=1 << 40),
    "offset at the end": lambda a: _set_blob(a, offset=(a / WEIGHTS).stat().st_size - 8),
    "weights outside": lambda a: _set_blob(a, fileName="@model_path/../../../weight.bin"),
    "weights at an absolute path": lambda a: _set_blob(a, fileName="@model_path//etc/passwd"),
    "weights elsewhere": lambda a: _set_blob(a, fileName="/etc/passwd"),
    "no manifest": lambda a: (a / "Manifest.json").unlink(),
    "manifest is no JSON": lambda a: (a / "Manifest.json").write_text("{"),
    "manifest is a list": lambda a: (a / "Manifest.json").write_text("[]"),
    "manifest leaves the package": lambda a: _escape(a, "../../../model.mlmodel"),
    "manifest with an absolute path": lambda a: _escape(a, "/etc/passwd"),
    "manifest with a path that is none": lambda a: _escape(a, "\\u0000"),
    "model missing": lambda a: (a / MODEL).unlink(),
    "model is no protobuf": lambda a: (a / MODEL).write_bytes(b"\xff" * 40),
    "layers are no JSON": lambda a: edit_model(
        a, lambda s: s.description.metadata.userDefined.update({"dkm_export.layers": "["})
    ),
    "no function": lambda a: edit_model(a, lambda s: s.mlProgram.functions.pop("main")),
    "a palette is gone": lambda a: edit_model(
        a, lambda s: setattr(operations(s)[0].outputs[0], "name", "other")
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_packages_are_refused(
    case: str, tokens: tuple[PalettizedModel, Path], tmp_path: Path
) -> None:
    artifact = Path(shutil.copytree(tokens[1], tmp_path / tokens[1].name))
    MALFORMED[case](artifact)
    with pytest.raises(InvalidInput, match=artifact.name):
        CoreMLExporter().read_palettes(artifact)


def test_random_damage_raises_nothing_else(
    tokens: tuple[PalettizedModel, Path], tmp_path: Path
) -> None:
    artifact = Path(shutil.copytree(tokens[1], tmp_path / tokens[1].name))
    generator = random.Random(0)
    files = {name: (artifact / name).read_bytes() for name in (MODEL, WEIGHTS, "Manifest.json")}
    for _ in range(150):
        for name, original in files.items():
            damaged = bytearray(original)
            for _ in range(generator.choice((0, 1, 3))):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            (artifact / name).write_bytes(damaged)
        try:
            CoreMLExporter().read_palettes(artifact)
            session = CoreMLReferenceRuntime().load(artifact)
            session.run({"tokens": np.zeros((1, 12), np.int32)})
        except DkmError:
            continue


def test_unknown_operators_are_named(tokens: tuple[PalettizedModel, Path], tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(tokens[1], tmp_path / tokens[1].name))

    def rename(spec: Any) -> None:
        next(o for o in operations(spec) if o.type == "gelu").type = "mystery"

    edit_model(artifact, rename)
    with pytest.raises(Unsupported, match="'mystery' of 'gelu_cast_fp16'"):
        CoreMLReferenceRuntime().load(artifact)
