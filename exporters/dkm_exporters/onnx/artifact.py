"""The ``.onnx`` file: written with a table of its palettes, read back without trusting it.

The model's ``metadata_props`` has one key, ``dkm``, with a JSON object: schema version and the
layout of each palette. The LUTs and indices are the initializers named in `decoding`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import NameFixPass
from pydantic import ValidationError

from dkm_export import __version__
from dkm_export.entry import PaletteEntry
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.fields import unpack_fields
from dkm_export.palette import Palette, packed_size
from dkm_export.spec import Frozen
from dkm_export.validation import explain

_KEY = "dkm"
_LARGEST_FILE = 2**31 - 1


class _Table(Frozen):
    schema_version: Literal[1] = 1
    layers: dict[str, PaletteEntry]


def write_artifact(model: ir.Model, palettes: Mapping[str, Palette], path: Path) -> None:
    """Write ``model``, whose weights are decoded from ``palettes``; same model, same bytes.

    Raises:
        Unsupported: when the file would exceed the 2 GB that protobuf allows.
    """
    layers = {name: PaletteEntry.of(palette) for name, palette in palettes.items()}
    model.metadata_props[_KEY] = _Table(layers=layers).model_dump_json()
    model.producer_name, model.producer_version = "dkm-export", __version__
    NameFixPass()(model)
    weights = [value.const_value for value in model.graph.initializers.values()]
    if sum(weight.nbytes for weight in weights if weight is not None) > _LARGEST_FILE:
        raise Unsupported("onnx: a file cannot exceed 2 GB: palettize more of the dense weights")
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def read_artifact(path: Path) -> dict[str, Palette]:
    """Decode and validate all palettes of a file that `write_artifact` wrote.

    Raises:
        InvalidInput: when the file is missing, truncated, malformed or contradicts itself.
    """
    return decode(path, *_parse(path))


def decode(
    path: Path, metadata: Mapping[str, str], initializers: Mapping[str, onnx.TensorProto]
) -> dict[str, Palette]:
    """Decode and validate all palettes of a file that holds these metadata and initializers.

    Raises:
        InvalidInput: when one of them is missing or contradicts the others.
    """
    if _KEY not in metadata:
        raise InvalidInput(f"{path}: has no '{_KEY}' metadata, so `dkm export` did not write it")
    try:
        table = _Table.model_validate_json(metadata[_KEY])
    except ValidationError as error:
        raise InvalidInput(f"{path}: {explain(error, _Table)}") from error
    palettes = {}
    for name, entry in table.layers.items():
        try:
            palettes[name] = _palette(name, entry, initializers)
        except KeyError as error:
            raise InvalidInput(
                f"{path}: initializer {error} is missing: a simplifier such as onnxsim, or saving "
                "an optimized model, puts weights back to full size: use the file as exported"
            ) from error
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {name}: {error}") from error
    return palettes


def _parse(path: Path) -> tuple[dict[str, str], dict[str, onnx.TensorProto]]:
    """The metadata and the initializers by name."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    except (DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: not an ONNX file, or cut short") from error
    if len(initializers) < len(model.graph.initializer):
        raise InvalidInput(f"{path}: two initializers have the same name")
    return metadata, initializers


def _palette(
    name: str, entry: PaletteEntry, initializers: Mapping[str, onnx.TensorProto]
) -> Palette:
    layout = entry.layout
    count = layout.vectors
    lut = _array(initializers[f"{name}.lut"], "<f2", (layout.groups << entry.bits, layout.dim))
    packed = _array(initializers[f"{name}.indices"], "u1", (packed_size(count, entry.bits),))
    indices = unpack_fields(packed, entry.bits, count).reshape(layout.index_shape)
    scale = None
    if f"{name}.scale" in initializers:
        tensor = initializers[f"{name}.scale"]
        # A factor per output channel: along axis 0 or, for a transposed convolution, axis 1.
        channels = next((axis for axis, size in enumerate(tensor.dims) if size != 1), 0)
        broadcast = (size if axis == channels else 1 for axis, size in enumerate(layout.shape))
        scale = _array(tensor, "<f4", tuple(broadcast))
    return Palette(entry.bits, layout, lut.reshape(layout.groups, -1, layout.dim), indices, scale)


def _array(tensor: onnx.TensorProto, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The values of an initializer that has to have this dtype and shape.

    Raises:
        InvalidInput: when it has others, lies in another file, or has too few or too many bytes.
    """
    expected = np.dtype(dtype)
    if (
        tensor.data_type != onnx.helper.np_dtype_to_tensor_dtype(expected)
        or tuple(tensor.dims) != shape
        or tensor.data_location != onnx.TensorProto.DEFAULT
        or len(tensor.raw_data) != math.prod(shape) * expected.itemsize
    ):
        raise InvalidInput(f"initializer '{tensor.name}' is not {expected}{list(shape)} in place")
    return np.frombuffer(tensor.raw_data, expected).reshape(shape)
