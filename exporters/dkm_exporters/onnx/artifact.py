"""The ``.onnx`` file: written with a table of its palettes, read back without trusting it.

The model's ``metadata_props`` has one key, ``dkm``, with a JSON object: schema version, the layout
of each palette, and why weights of layers stayed dense. The LUTs and indices are the initializers
named in `decoding`. What is too large for protobuf's 2 GB has its tensors in ``<name>.onnx.data``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.external_data import unload_from_model
from onnx_ir.passes.common import NameFixPass
from pydantic import Field, ValidationError

from dkm_export import __version__
from dkm_export.entry import PaletteEntry
from dkm_export.errors import InvalidInput
from dkm_export.exporting.description import NO_WEIGHT, StoredTensor, stored_palette
from dkm_export.palette import Layout, Palette, lut_size, packed_size
from dkm_export.spec import Frozen
from dkm_export.validation import explain
from dkm_exporters.onnx.contents import Contents
from dkm_exporters.onnx.options import OnnxOptions, data_file
from dkm_exporters.onnx.packing import transposed, unpack_indices
from dkm_exporters.onnx.placing import ONCE
from dkm_exporters.onnx.stored import Sizes, plain

KEY: Final = "dkm"
"""Of the metadata of what `dkm export` wrote."""
_LARGEST_FILE = 2**31 - 2**26
"""Bytes of tensors: protobuf's limit, less some for the graph."""
_OUTSIDE_FROM = 1 << 10
"""Bytes from which on a tensor goes into the file beside a model that is too large for one."""

KEEP: Final = (
    "ship this file as it is: onnxsim and other simplifiers, and saving an optimized model, "
    "put the weights back to full size"
)
"""What developers of an app have to know; a note in the model and in the report."""


class Table(Frozen):
    """The metadata.

    Attributes:
        layers: each palette by parameter name.
        dense: by parameter name, why the weight of a layer has no palette.
        transposed: parameters whose indices and scale are those of the transposed weight.
        side_data: type of what else is stored, see `OnnxOptions`.
    """

    schema_version: Literal[1]
    layers: dict[str, PaletteEntry]
    transposed: tuple[str, ...] = ()
    dense: dict[str, str] = Field(default_factory=dict)
    side_data: Literal["fp32", "fp16"] = "fp32"


def write_artifact(
    model: ir.Model,
    palettes: Mapping[str, Palette],
    path: Path,
    options: OnnxOptions,
    dense: Mapping[str, str] = {},
    turned: Sequence[str] = (),
) -> None:
    """Write ``model``, whose weights are decoded from ``palettes``; same model, same bytes.

    Args:
        model: with decoders.
        palettes: by parameter name.
        path: of the file; tensors go into `data_file` when they are too many bytes for protobuf.
        options: settings of the target.
        dense: why weights of layers have no palette.
        turned: names of the palettes that are stored transposed.
    """
    layers = {name: PaletteEntry.of(palette) for name, palette in palettes.items()}
    table = Table(
        schema_version=1,
        layers=layers,
        transposed=tuple(turned),
        dense=dict(dense),
        side_data=options.side_data,
    )
    model.metadata_props[KEY] = table.model_dump_json(exclude_defaults=True)
    model.producer_name, model.producer_version = "dkm-export", __version__
    model.doc_string = f"Weights are palettes, decoded in the graph: {KEEP}."
    NameFixPass()(model)
    weights = [value.const_value for value in model.graph.initializers.values()]
    outside = sum(weight.nbytes for weight in weights if weight is not None) > _LARGEST_FILE
    if outside:
        name = data_file(path).name
        unload_from_model(model, path.parent, name, size_threshold_bytes=_OUTSIDE_FROM)
    proto = ir.to_proto(model)
    _drop_types(proto, palettes)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    onnx.checker.check_model(path if outside else proto)


def _drop_types(proto: onnx.ModelProto, palettes: Mapping[str, Palette]) -> None:
    """Remove the types of initializers and decoded weights, which their definitions tell."""
    known = {tensor.name for tensor in proto.graph.initializer} | palettes.keys()
    known |= {f"{name}.T" for name in palettes}
    kept = [value for value in proto.graph.value_info if value.name not in known]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)


@dataclass(frozen=True, eq=False)
class Artifact:
    """What is read of a file, ``.onnx`` or ``.ort``: its table, and its initializers by name."""

    path: Path
    table: Table
    initializers: Mapping[str, onnx.TensorProto]

    @classmethod
    def of(cls, contents: Contents) -> Self:
        """Find the table among the metadata.

        Raises:
            InvalidInput: when it is not there or malformed.
        """
        path = contents.path
        initializers = {tensor.name: tensor for tensor in contents.initializers}
        if len(initializers) < len(contents.initializers):
            raise InvalidInput(f"{path}: two initializers have the same name")
        if KEY not in contents.metadata:
            raise InvalidInput(f"{path}: has no '{KEY}' metadata, so `dkm export` did not write it")
        try:
            table = Table.model_validate_json(contents.metadata[KEY])
        except ValidationError as error:
            raise InvalidInput(f"{path}: {explain(error, Table)}") from error
        return cls(path, table, initializers)

    def palettes(self) -> dict[str, Palette]:
        """Decode and validate all palettes.

        Raises:
            InvalidInput: when the file contradicts itself.
        """
        self._require_bytes()
        palettes = {}
        for name, entry in self.table.layers.items():
            try:
                palettes[name] = self._palette(name, entry)
            except InvalidInput as error:
                raise InvalidInput(f"{self.path}: {name}: {error}") from error
        return palettes

    def stored(self, palettes: Mapping[str, Palette]) -> Iterator[StoredTensor]:
        """What is stored: these palettes, then tensors without one in the order of the file.

        Raises:
            InvalidInput: when an initializer is of another size than it says.
        """
        sizes, parts = Sizes(self.path), set[str]()
        for name, palette in palettes.items():
            own = {part: f"{name}.{part}" for part in ("indices", "lut", "scale")}
            value, lut, scale = (
                sizes.of(self.initializers[part])[0] if part in self.initializers else 0
                for part in own.values()
            )
            parts.update(own.values())
            yield stored_palette(name, palette, value_bytes=value, lut_bytes=lut, scale_bytes=scale)
        for name, tensor in self.initializers.items():
            if name not in parts and not name.startswith(ONCE):
                reason = self.table.dense.get(name, NO_WEIGHT)
                yield plain(tensor, sizes, reason)

    def _require_bytes(self) -> None:
        """Refuse more palettes than bytes, where tensors beside the file could overlap."""
        beside = data_file(self.path)
        if not beside.is_file():
            return
        there, claimed = self.path.stat().st_size + beside.stat().st_size, 0
        for name, entry in self.table.layers.items():
            try:
                layout = entry.layout
            except InvalidInput as error:
                raise InvalidInput(f"{self.path}: {name}: {error}") from error
            claimed += packed_size(layout.vectors, entry.bits) + lut_size(layout, entry.bits)
        if claimed > there:
            raise InvalidInput(f"{self.path}: its palettes need {claimed} bytes, it has {there}")

    def _palette(self, name: str, entry: PaletteEntry) -> Palette:
        layout = entry.layout
        turned = name in self.table.transposed
        if turned:
            if len(layout.shape) != 2 or layout.groups > 1:
                raise InvalidInput("only weights with two axes and one LUT are stored transposed")
            layout = Layout((layout.shape[1], layout.shape[0]), layout.dim, 1 - layout.axis)
        lut = self._array(f"{name}.lut", "<f2", (layout.groups << entry.bits, layout.dim))
        scale = self._scale(name, layout)
        palette = Palette(
            entry.bits,
            layout,
            lut.reshape(layout.groups, -1, layout.dim),
            self._indices(name, entry.bits, layout),
            scale,
        )
        return transposed(palette) if turned else palette

    def _indices(self, name: str, bits: int, layout: Layout) -> npt.NDArray[np.uint8]:
        count, shape = layout.vectors, tuple(self._initializer(f"{name}.indices").dims)
        expected: tuple[int, ...] = (packed_size(count, bits),)
        if len(shape) == 2:
            rows = layout.index_shape[0] if shape[0] == layout.index_shape[0] else 1
            expected = (rows, packed_size(count // rows, bits))
        return unpack_indices(self._array(f"{name}.indices", "u1", expected), bits, layout)

    def _scale(self, name: str, layout: Layout) -> npt.NDArray[np.float32] | None:
        if f"{name}.scale" not in self.initializers:
            return None
        # A factor per output channel: along axis 0 or, for a transposed convolution, axis 1.
        dims = tuple(self._initializer(f"{name}.scale").dims)
        fits = [
            tuple(size if axis == channels else 1 for axis, size in enumerate(layout.shape))
            for channels in range(len(layout.shape))
        ]
        dtype = "<f2" if self.table.side_data == "fp16" else "<f4"
        shape = dims if dims in fits else fits[0]
        return self._array(f"{name}.scale", dtype, shape).astype(np.float32)

    def _initializer(self, name: str) -> onnx.TensorProto:
        if name not in self.initializers:
            raise InvalidInput(f"initializer '{name}' is missing: {KEEP}")
        return self.initializers[name]

    def _array(self, name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """The values of an initializer that has to have this dtype and shape.

        Raises:
            InvalidInput: when it has others, or too few or too many bytes, or lies in another file
                than `data_file`.
        """
        tensor, expected = self._initializer(name), np.dtype(dtype)
        right = (
            tensor.data_type == onnx.helper.np_dtype_to_tensor_dtype(expected)
            and tuple(tensor.dims) == shape
        )
        size = math.prod(shape) * expected.itemsize
        content = self._outside(tensor, size) if tensor.external_data else tensor.raw_data
        if not right or len(content) != size:
            raise InvalidInput(f"initializer '{name}' is not {expected}{list(shape)} in place")
        return np.frombuffer(content, expected).reshape(shape)

    def _outside(self, tensor: onnx.TensorProto, size: int) -> bytes:
        """The bytes of a tensor in `data_file`, at most ``size``."""
        place = {entry.key: entry.value for entry in tensor.external_data}
        file = data_file(self.path)
        if place.get("location") != file.name:
            raise InvalidInput(f"initializer '{tensor.name}' is not in {file.name}")
        try:
            offset, length = int(place.get("offset", "0")), int(place["length"])
            if length != size or not 0 <= offset <= file.stat().st_size - size:
                return b""
            with file.open("rb") as stream:
                stream.seek(offset)
                return stream.read(size)
        except (KeyError, ValueError, OverflowError) as error:
            raise InvalidInput(
                f"initializer '{tensor.name}' has no place in {file.name}"
            ) from error
        except OSError as error:
            raise InvalidInput(f"{file.name} cannot be read: {error.strerror}") from error
