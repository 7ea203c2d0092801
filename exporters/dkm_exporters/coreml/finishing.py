"""Check a package that coremltools wrote, and describe the model in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dkm_export import __version__
from dkm_export.errors import Unsupported
from dkm_export.palettized import PalettizedModel
from dkm_exporters.coreml.options import IMAGES_KEY, CoreMLOptions
from dkm_exporters.mlprogram.palettes import LAYERS_KEY, layers_metadata
from dkm_exporters.mlprogram.writing import palettes_missing, read_model, write_model


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
    spec = read_model(path)
    _check_palettes(spec, operations)
    _check_names(spec, model)
    _describe(spec.description.metadata, model, operations, options)
    write_model(path, spec)


def _check_palettes(spec: Any, operations: Mapping[str, str]) -> None:
    for operation in palettes_missing(spec, operations):
        raise Unsupported(
            f"coreml: {operations[operation]}: the converted program has no palette "
            f"'{operation}': skip the layer in the recipe, or rename an input or output of that "
            "name"
        )


def _describe(
    metadata: Any, model: PalettizedModel, operations: Mapping[str, str], options: CoreMLOptions
) -> None:
    """What Xcode shows of the model, and what `dkm` reads back."""
    metadata.author, metadata.license = options.author, options.license
    metadata.versionString, metadata.shortDescription = options.version, options.description
    metadata.userDefined[LAYERS_KEY] = layers_metadata(operations, model.palettes)
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
