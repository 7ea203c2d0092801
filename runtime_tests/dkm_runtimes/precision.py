"""How precisely ONNX models compute, by what `dkm export` wrote into their metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dkm_export.checking.runtime import NumericClass
from dkm_export.errors import InvalidInput


def numeric_class(metadata: Mapping[str, str]) -> NumericClass:
    """The class that the ``dkm`` entry of a model's metadata, JSON, tells.

    Raises:
        InvalidInput: when it is no JSON.
    """
    try:
        table = json.loads(metadata.get("dkm", "{}"))
    except ValueError as error:
        raise InvalidInput("the 'dkm' metadata of the model is no JSON: export it again") from error
    stored = isinstance(table, dict) and table.get("side_data") == "fp16"
    return NumericClass.FP16_STORED if stored else NumericClass.FP32


def numeric_class_of(artifact: Path) -> NumericClass:
    """The class of an ``.onnx`` file that a runtime has opened, but whose metadata it keeps.

    Raises:
        InvalidInput: when the metadata are malformed.
    """
    import onnx

    model = onnx.load(artifact, load_external_data=False)
    return numeric_class({entry.key: entry.value for entry in model.metadata_props})
