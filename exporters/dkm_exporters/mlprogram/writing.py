"""Write what coremltools made anew: in fewer bytes, which do not change by run."""

from __future__ import annotations

import json
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from coremltools.proto import Model_pb2

from dkm_exporters.mlprogram.constants import LUT_TO_DENSE

_AUTHOR: Final = "com.apple.CoreML"
_MODEL: Final = f"{_AUTHOR}/model.mlmodel"
_WEIGHTS: Final = f"{_AUTHOR}/weights"


def read_model(path: Path) -> Any:
    """The ``Model`` of a package that coremltools wrote."""
    return Model_pb2.Model.FromString((path / "Data" / _MODEL).read_bytes())


def write_model(path: Path, spec: Any) -> None:
    """Write the model and the manifest of a package anew.

    Args:
        path: of the ``.mlpackage``.
        spec: its ``Model``, which loses all but one of equal constants.
    """
    for block in _blocks(spec):
        _share_constants(block)
    file = path / "Data" / _MODEL
    file.write_bytes(spec.SerializeToString(deterministic=True))
    weights = path / "Data" / _WEIGHTS
    (path / "Manifest.json").write_text(_manifest(with_weights=weights.exists()))
    # coremltools makes these readable for their owner only.
    file.chmod(stat.S_IMODE((path / "Manifest.json").stat().st_mode))
    if weights.exists():
        weights.chmod(stat.S_IMODE(path.stat().st_mode))


def palettes_missing(spec: Any, operations: Iterable[str]) -> list[str]:
    """Those of the names of operations that decode a palette which the program does not have."""
    present = {
        operation.outputs[0].name
        for block in _blocks(spec)
        for operation in block.operations
        if operation.type == LUT_TO_DENSE
    }
    return [name for name in operations if name not in present]


def _blocks(spec: Any) -> list[Any]:
    return [
        block
        for function in spec.mlProgram.functions.values()
        for block in function.block_specializations.values()
    ]


def _share_constants(block: Any) -> None:
    """Keep one of equal constants in the model file, of which every operation has its own."""
    kept: dict[bytes, str] = {}
    equal: dict[str, str] = {}
    for operation in block.operations:
        if operation.type == "const" and operation.attributes["val"].HasField("immediateValue"):
            value = operation.attributes["val"].SerializeToString(deterministic=True)
            name = operation.outputs[0].name
            equal[name] = kept.setdefault(value, name)
    for index in reversed(range(len(block.operations))):
        operation = block.operations[index]
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                if binding.name in equal:
                    binding.name = equal[binding.name]
        name = operation.outputs[0].name
        if equal.get(name, name) != name and name not in block.outputs:
            del block.operations[index]


def _manifest(*, with_weights: bool) -> str:
    """``Manifest.json`` with ids that follow from the paths; coremltools draws random ones."""
    items = {
        str(uuid.uuid5(uuid.NAMESPACE_URL, path)): {
            "author": _AUTHOR,
            "description": description,
            "name": path.rpartition("/")[2],
            "path": path,
        }
        for path, description in (
            (_MODEL, "CoreML Model Specification"),
            (_WEIGHTS, "CoreML Model Weights"),
        )
        if path != _WEIGHTS or with_weights
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": items,
        "rootModelIdentifier": str(uuid.uuid5(uuid.NAMESPACE_URL, _MODEL)),
    }
    return json.dumps(manifest, indent=4, sort_keys=True) + "\n"
