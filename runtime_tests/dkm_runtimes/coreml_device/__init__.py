"""An XCTest with samples, for the tests of an app.

``Tests.swift`` and ``README.md`` beside this file are templates. Only names of files are filled in:
what else the Swift code has to know of a model, it reads from a JSON file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dkm_export.checking.metrics import Limits
from dkm_export.checking.runtime import Arrays, NumericClass
from dkm_exporters.coreml.options import ImageInput
from dkm_exporters.mlprogram.package import Package
from dkm_runtimes.pixels import image_inputs, picture

_OPAQUE: Final = 255


def device_test(
    package: Package,
    numeric_class: NumericClass,
    inputs: Arrays,
    outputs: Arrays,
    limits: Limits,
) -> dict[str, bytes]:
    """Contents of the test's files by name; see `Runtime.device_test`.

    Raises:
        Unsupported: when the package takes an image and a sample is none.
        InvalidInput: when the package is malformed.
    """
    images = image_inputs(package)
    given = {
        name: _images(name, stacked, images[name]) if name in images else _scalars(stacked)
        for name, stacked in inputs.items()
    }
    expected = {name: _scalars(stacked) for name, stacked in outputs.items()}
    (count,) = {len(stacked) for stacked in expected.values()}
    layout = {
        "model": package.path.stem,
        "count": count,
        "limits": {
            "relativeL2": limits.relative_l2,
            "rtol": limits.rtol,
            "atol": limits.atol,
            "sqnrDB": limits.sqnr_db,
        },
        "inputs": _entries(given, 0),
        "outputs": _entries(expected, sum(array.nbytes for array in given.values())),
    }
    prefix = _prefix(package.path.stem)
    words = {"PREFIX": prefix, "MODEL": package.path.stem, "CLASS": numeric_class.value}
    return {
        f"{prefix}Tests.swift": _filled("Tests.swift", words),
        f"{prefix}Samples.json": json.dumps(layout, indent=2).encode() + b"\n",
        f"{prefix}Samples.bin": b"".join(
            array.tobytes() for array in (*given.values(), *expected.values())
        ),
        "README.md": _filled("README.md", words),
    }


def _scalars(stacked: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Little-endian, and of a type that Core ML's inputs and outputs have."""
    return stacked.astype("<f4" if stacked.dtype.kind == "f" else "<i4")


def _images(name: str, stacked: npt.NDArray[Any], image: ImageInput) -> npt.NDArray[np.uint8]:
    """``[samples, height, width, 4]`` of blue, green, red, alpha, or ``[..., 1]`` of grey."""
    pictures = np.stack([picture(name, x, image) for x in stacked])
    if pictures.ndim == 3:
        return pictures[..., np.newaxis]
    alpha = np.full((*pictures.shape[:-1], 1), _OPAQUE, np.uint8)
    return np.concatenate([pictures[..., ::-1], alpha], axis=-1)


def _entries(arrays: Arrays, offset: int) -> list[dict[str, Any]]:
    """What the test has to know of each array; they lie one after the other from ``offset`` on."""
    kinds = {"f": "float32", "i": "int32", "u": "image"}
    entries = []
    for name, array in arrays.items():
        kind, shape = kinds[array.dtype.kind], list(array.shape[1:])
        entries.append({"name": name, "kind": kind, "shape": shape, "offset": offset})
        offset += array.nbytes
    return entries


def _prefix(model: str) -> str:
    """``DigitsCnn`` for ``digits_cnn``: an identifier, whatever an artifact's file is called."""
    words = re.findall("[A-Za-z][A-Za-z0-9]*", model)
    return "".join(word[0].upper() + word[1:] for word in words) or "Model"


def _filled(template: str, words: Mapping[str, str]) -> bytes:
    text = Path(__file__).with_name(template).read_text()
    for word, value in words.items():
        text = text.replace(f"__{word}__", value)
    return text.encode()
