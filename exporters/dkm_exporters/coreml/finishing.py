"""Give a package that coremltools wrote layer names, and fewer bytes that do not change by run."""

from __future__ import annotations

import json
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from coremltools.proto import Model_pb2

from dkm_export import __version__
from dkm_export.errors import Unsupported
from dkm_export.palettized import PalettizedModel
from dkm_exporters.coreml.constants import LUT_TO_DENSE
from dkm_exporters.coreml.options import IMAGES_KEY, CoreMLOptions
from dkm_exporters.coreml.palettes import LAYERS_KEY, Layer, layers_metadata

_AUTHOR: Final = "com.apple.CoreML"
_MODEL: Final = f"{_AUTHOR}/model.mlmodel"
_WEIGHTS: Final = f"{_AUTHOR}/weights"


def finish(
    path: Path, model: PalettizedModel, operations: Mapping[str, str], options: CoreMLOptions
) -> None:
    """Check the package at ``path`` against ``model`` and write its model and manifest anew.

    Args:
        path: of the ``.mlpackage``.
        model: what it was converted from.
        operations: parameter name by the name of the operation that decodes its palette.
        options: it was converted with.

    Raises:
        Unsupported: when a palette ended up dense, or an input or output got another name.
    """
    file = path / "Data" / _MODEL
    spec = Model_pb2.Model.FromString(file.read_bytes())
    _check_palettes(spec, operations)
    _check_names(spec, model)
    _describe(spec.description.metadata, model, operations, options)
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            _share_constants(block)
    file.write_bytes(spec.SerializeToString(deterministic=True))
    (path / "Manifest.json").write_text(_manifest())
    # coremltools makes these readable for their owner only.
    file.chmod(stat.S_IMODE((path / "Manifest.json").stat().st_mode))
    (path / "Data" / _WEIGHTS).chmod(stat.S_IMODE(path.stat().st_mode))


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


def _check_palettes(spec: Any, operations: Mapping[str, str]) -> None:
    present = {
        operation.outputs[0].name
        for function in spec.mlProgram.functions.values()
        for block in function.block_specializations.values()
        for operation in block.operations
        if operation.type == LUT_TO_DENSE
    }
    for operation, parameter in operations.items():
        if operation not in present:
            raise Unsupported(
                f"coreml: {parameter}: the converted program has no palette '{operation}': skip "
                "the layer in the recipe, or rename an input or output of that name"
            )


def _describe(
    metadata: Any, model: PalettizedModel, operations: Mapping[str, str], options: CoreMLOptions
) -> None:
    """What Xcode shows of the model, and what `dkm` reads back."""
    metadata.author, metadata.license = options.author, options.license
    metadata.versionString, metadata.shortDescription = options.version, options.description
    layers = {}
    for operation, parameter in operations.items():
        palette = model.palettes[parameter]
        layers[operation] = Layer(
            name=parameter,
            bits=palette.bits,
            dim=palette.layout.dim,
            axis=palette.layout.axis,
        )
    metadata.userDefined[LAYERS_KEY] = layers_metadata(layers)
    metadata.userDefined["dkm_export.version"] = __version__
    if model.sha256:
        metadata.userDefined["dkm_export.checkpoint_sha256"] = model.sha256
    if options.images:
        images = {name: image.model_dump() for name, image in options.images.items()}
        metadata.userDefined[IMAGES_KEY] = json.dumps(images, sort_keys=True)


def _check_names(spec: Any, model: PalettizedModel) -> None:
    source, description = model.source, spec.description
    expected = [*(entry.name for entry in source.inputs), *source.outputs]
    own = {description.predictedFeatureName, description.predictedProbabilitiesName}
    actual = [
        entry.name for entry in (*description.input, *description.output) if entry.name not in own
    ]
    for ours, theirs in zip(expected, actual, strict=True):
        if ours != theirs:
            raise Unsupported(
                f"coreml: the name '{ours}' became '{theirs}' in conversion: choose another one, "
                "and return no tensor twice"
            )


def _manifest() -> str:
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
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": items,
        "rootModelIdentifier": str(uuid.uuid5(uuid.NAMESPACE_URL, _MODEL)),
    }
    return json.dumps(manifest, indent=4, sort_keys=True) + "\n"
