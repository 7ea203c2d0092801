"""What an ``.onnx`` or ``.ort`` file stores, with the palettes of those that `dkm export` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from dkm_export.errors import InvalidInput
from dkm_export.exporting.description import Description, distinct
from dkm_exporters.onnx.artifact import KEY, Artifact
from dkm_exporters.onnx.contents import Contents, outside
from dkm_exporters.onnx.stored import stored_tensors


def describe(contents: Contents, files: Sequence[Path]) -> Description:
    """Say what is stored.

    Args:
        contents: of the file.
        files: that belong to it, whatever it says.

    Raises:
        InvalidInput: when it contradicts itself.
    """
    if next(contents.tensors, None) is None and next(contents.nodes, None) is None:
        raise InvalidInput(f"{contents.path}: holds no model")
    external = [
        outside(contents.path, tensor)[0]
        for tensor in contents.tensors
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    everything = list(dict.fromkeys((*files, *external)))
    if KEY not in contents.metadata:
        return Description(everything, distinct(stored_tensors(contents)))
    artifact = Artifact.of(contents)
    palettes = artifact.palettes()
    return Description(everything, distinct(artifact.stored(palettes)), palettes)
