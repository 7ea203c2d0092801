from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from dkm_export.errors import InvalidInput
from dkm_export.manifest import Contents, read_manifest
from dkm_export.spec import Frozen, LayerRule
from dkm_export.validation import explain
from tests.zoo import IMAGE, palettize

FILE = {"path": "a", "bytes": 1, "sha256": ""}
ARTIFACT = {"target": "onnx", "path": "onnx/a.onnx", "options": {}, "bytes": 1, "files": [FILE]}


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    model = palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=4))
    return {
        "tool_version": "0",
        "dependencies": {},
        "contents": Contents.of(model).model_dump(mode="json"),
        "checkpoint": FILE,
        "samples": FILE,
        "artifacts": [ARTIFACT],
    }


@pytest.mark.parametrize("path", ["../up", "/etc/passwd", "a/../../b", "", "nul\0"])
def test_no_path_leaves_the_folder(manifest: dict[str, Any], tmp_path: Path, path: str) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(manifest))
    assert read_manifest(tmp_path).artifacts[0].path == "onnx/a.onnx"
    for doctored in (
        manifest | {"samples": FILE | {"path": path}},
        manifest | {"artifacts": [ARTIFACT | {"path": path}]},
    ):
        file.write_text(json.dumps(doctored))
        with pytest.raises(InvalidInput, match="leaves the folder of the manifest"):
            read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": FILE | {"bytes": -1}}, "'samples.bytes'"),
        ({"extra": 1}, "'extra': unknown key, allowed: schema_version"),
        ({"contents": {}}, "'contents.name': Field required"),
    ],
)
def test_malformed_manifests(
    manifest: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(InvalidInput, match=message):
        read_manifest(tmp_path)


def test_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="give the folder of `dkm export`"):
        read_manifest(tmp_path)


class _Leaf(Frozen):
    shape: tuple[int, ...]


class _Tree(Frozen):
    shape: dict[str, _Leaf]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"shape": {}, "x": 1}, "'x': unknown key, allowed: shape"),
        # a dictionary's key may be called like a field
        ({"shape": {"shape": {"shape": [1], "x": 1}}}, "'shape.shape.x': unknown key, allowed: s"),
        ({"shape": {"a": {"shape": ["b"]}, "b": 1}}, "'shape.a.shape.0': Input should be .* more"),
        # a required key may be missing because its name is misspelt
        ({"shap": {}}, "'shap': unknown key, allowed: shape .and 1 more"),
        (3, "'the whole': "),
    ],
)
def test_findings_are_explained_in_a_line(data: object, message: str) -> None:
    model: type[BaseModel] = _Tree
    with pytest.raises(ValidationError) as caught:
        model.model_validate(data)
    with pytest.raises(InvalidInput, match=message):
        raise InvalidInput(explain(caught.value, model))
