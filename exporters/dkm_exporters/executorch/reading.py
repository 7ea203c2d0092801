"""Palettes read back from a program by running the decodes that it contains.

A list of which constant is whose would be one more thing that can be wrong: a doctored file could
show the reader one constant and run another. So the reader runs the instructions of ``forward``
that depend on constants alone. Indices are what the program looks up in a LUT, the LUT is where
it looks, and the weight that comes out must reach another instruction, bit for bit as the palette
gives it. Of an embedding, a few rows are looked up and have to come out; the packed rows that they
come from are the palette. A delegate asks for weights by their hash: a packed one has to expand to
what is asked for. Only the order in which parameters are decoded is taken from the header: with
another order, the palettes no longer agree with the checkpoint.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from dkm_export.entry import PaletteEntry
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.fields import unpack_fields
from dkm_export.palette import Palette, packed_size
from dkm_export.plugins import missing_packages
from dkm_export.validation import explain
from dkm_exporters.executorch.blob import read_blob
from dkm_exporters.executorch.buffers import Buffers
from dkm_exporters.executorch.header import PALETTES_METHOD, Header
from dkm_exporters.executorch.interpreter import Interpreter, Lookup, Rows, Value
from dkm_exporters.executorch.options import WEIGHTS_SUFFIX
from dkm_exporters.executorch.program import ProgramFile
from dkm_exporters.executorch.weights_file import WeightsFile
from dkm_exporters.executorch.xnnpack import BLOB_PREFIX
from dkm_exporters.executorch.xnnpack_graph import read_constants

COREML = "CoreMLBackend"
"""The name of ExecuTorch's Core ML delegate."""


def read(path: Path) -> dict[str, Palette]:
    """The palettes of a program, by parameter name, without scales.

    Raises:
        InvalidInput: when the file is missing, truncated, malformed or contradicts itself.
    """
    return {name: decode.palette for name, decode in read_decodes(ProgramFile(path)).items()}


def read_decodes(file: ProgramFile) -> dict[str, Decode]:
    """The first decode of each palette of a program, by parameter name.

    Raises:
        InvalidInput: when the program is malformed or contradicts itself.
    """
    header = read_header(file)
    decodes: dict[str, Decode] = {}
    for names, decode in zip(header.decodes, _Reader(file, header).decodes(), strict=True):
        for name in names:
            difference = decodes.setdefault(name, decode).palette.difference(decode.palette)
            if difference:
                raise InvalidInput(
                    f"{file.path}: {name}: two of its decodes disagree: {difference}"
                )
    return {name: decodes[name] for name in header.layers}


def read_header(file: ProgramFile) -> Header:
    """What the program says about itself.

    Raises:
        InvalidInput: when it says nothing, or something malformed.
    """
    try:
        header = Header.model_validate_json("".join(file.strings(PALETTES_METHOD)))
    except ValidationError as error:
        raise InvalidInput(f"{file.path}: {explain(error, Header)}") from error
    decoded = {name for names in header.decodes for name in names}
    if decoded != header.layers.keys() or not all(header.decodes):
        raise InvalidInput(f"{file.path}: the layers and the order of their decodes disagree")
    for name, layer in header.layers.items():
        try:
            layout = layer.layout
        except InvalidInput as error:
            raise InvalidInput(f"{file.path}: {name}: {error}") from error
        if packed_size(layout.vectors, layer.bits) > file.size:
            raise InvalidInput(f"{file.path}: {name}: the file is too short for its indices")
    return header


@dataclass
class Decode:
    """A palette that the program decodes.

    Attributes:
        palette: without its scale, unless it is packed.
        name: of the parameter.
        used: whether the program uses the weight.
        key: by which a delegate asks for the weight, or an empty string.
        packed: the palette and its scale for that delegate, or None.
    """

    palette: Palette
    name: str = ""
    used: bool = False
    key: str = ""
    packed: bytes | None = None


class _Reader:
    """Follows a program and gives each decode that it finds the next name of the header."""

    def __init__(self, file: ProgramFile, header: Header) -> None:
        self._file, self._header = file, header
        self._names = (names[0] for names in header.decodes)
        self._buffers = Buffers(file)
        self._packed = _packed(file, header)

    def decodes(self) -> list[Decode]:
        """Each of the header's decodes."""
        decodes: list[Decode] = []
        methods = ("init", "forward") if self._header.backend == "xnnpack-init" else ("forward",)
        try:
            for method in methods:
                decodes += self._follow(method)
        except (IndexError, AttributeError, TypeError, ValueError) as error:
            raise InvalidInput(
                f"{self._file.path}: an instruction is malformed: export it again"
            ) from error
        for names, found in zip_longest(self._header.decodes, decodes):
            if names is None:
                raise InvalidInput(f"{self._file.path}: has more decodes than its header names")
            if found is None or not found.used:
                raise InvalidInput(
                    f"{self._file.path}: {names[0]}: the program does not compute this weight from "
                    "a palette: export it again"
                )
        self._buffers.check(self._header.buffers)
        return decodes

    def _follow(self, method: str) -> list[Decode]:
        """The decodes of one method."""
        lookups: dict[Lookup, Decode] = {}
        decodes: list[Decode] = []
        fewest = min((layer.shape[0] for layer in self._header.layers.values()), default=1)
        limit = _memory_limit(self._file, self._header)
        for step in Interpreter(self._file, method, limit, fewest).steps():
            for value in step.takes:
                if value.lookup is not None:
                    decode = lookups[value.lookup]
                    decode.used = decode.used or _is_weight(value, value.lookup, decode.palette)
            lookup = None if step.result is None else step.result.lookup
            if lookup is not None and lookup not in lookups:
                lookups[lookup] = self._looked_up(lookup)
                decodes.append(lookups[lookup])
            if step.delegate is not None:
                decodes += self._delegated(step.delegate)
            if method == "init":
                self._buffers.written(step, "" if lookup is None else lookups[lookup].name)
            else:
                self._buffers.taken(step)
        return decodes

    def _looked_up(self, lookup: Lookup) -> Decode:
        name, layer = self._next()
        try:
            return Decode(_palette(lookup, layer), name)
        except InvalidInput as error:
            raise InvalidInput(f"{self._file.path}: {name}: {error}") from error

    def _delegated(self, index: int) -> Iterator[Decode]:
        """The palettes of a delegate, in the order in which it asks for them."""
        if self._file.backend("forward", index) == COREML:
            yield from self._ml_program(index)
            return
        try:
            constants = read_constants(self._file.delegate("forward", index))
        except (ValueError, IndexError, struct.error) as error:
            raise InvalidInput(
                f"{self._file.path}: delegate {index} is malformed: export it again"
            ) from error
        for key in (constant.place.key for constant in constants):
            blob = self._packed(key)
            if blob is None:
                continue
            name, layer = self._next()
            try:
                palette = read_blob(blob, key, layer)
                yield Decode(palette, name, used=True, key=key, packed=blob)
            except InvalidInput as error:
                raise InvalidInput(f"{self._file.path}: {name}: {error}") from error

    def _ml_program(self, index: int) -> Iterator[Decode]:
        """The palettes of a Core ML delegate, in the order of its operations."""
        missing = missing_packages(("coremltools",), "coreml")
        if missing:
            raise Unsupported(f"{self._file.path}: {missing}")
        # It imports coremltools, which takes seconds.
        from dkm_exporters.executorch.ml_programs import read_part

        label = f"{self._file.path}: delegate {index}"
        for found, palette in read_part(self._file.delegate("forward", index), label).items():
            name, layer = self._next()
            if found != name or PaletteEntry.of(palette) != layer:
                raise InvalidInput(f"{label}: {found}: the header says '{name}', or another layout")
            yield Decode(palette, name, used=True)

    def _next(self) -> tuple[str, PaletteEntry]:
        name = next(self._names, "")
        layer = self._header.layers.get(name)
        if layer is None:
            raise InvalidInput(f"{self._file.path}: has more decodes than its header names")
        return name, layer


def _packed(file: ProgramFile, header: Header) -> Callable[[str], bytes | None]:
    """Finds the blob of a weight by its key."""
    if header.backend != "xnnpack-ptd":
        return lambda key: file.named(BLOB_PREFIX + key)
    blobs = WeightsFile.read(file.path.with_suffix(WEIGHTS_SUFFIX)).blobs
    for key in blobs:
        if file.named(key) is not None:
            raise InvalidInput(
                f"{file.path}: has a weight that {WEIGHTS_SUFFIX} has too: export it again"
            )
    return blobs.get


def _memory_limit(file: ProgramFile, header: Header) -> int:
    """Bytes: four times the largest weight, which its decode stays below, and the file unpacked."""
    weights = max((layer.layout.vectors * layer.dim for layer in header.layers.values()), default=0)
    return 4 * (4 * weights + 4 * file.size)


def _palette(lookup: Lookup, layer: PaletteEntry) -> Palette:
    layout = layer.layout
    lut = lookup.lut.reshape(-1)
    count = layout.groups << layer.bits
    indices = _indices(lookup, layer)
    if lut.size != count * layout.dim or indices.size != layout.vectors:
        raise InvalidInput(
            f"{indices.size} indices into {lut.size} LUT entries, "
            f"expected {layout.vectors} into {count * layout.dim}"
        )
    if (indices < 0).any() or (indices >> layer.bits).any():
        raise InvalidInput(f"indices exceed {layer.bits} bits")
    return Palette(
        layer.bits,
        layout,
        lut.reshape(layout.groups, -1, layout.dim).copy(),
        indices.astype(np.uint8).reshape(layout.index_shape),
    )


def _indices(lookup: Lookup, layer: PaletteEntry) -> npt.NDArray[Any]:
    """The index of each vector; as many as the program has, and of the values that it has."""
    layout = layer.layout
    if lookup.source is not None:
        packed = lookup.source.packed
        if len(layout.shape) != 2 or packed.shape[1] != packed_size(
            layout.index_shape[1], layer.bits
        ):
            return np.empty(0, np.uint8)
        return unpack_fields(packed, layer.bits, layout.index_shape[1])
    if lookup.rows.size != layout.vectors:
        return lookup.rows
    # The program's indices count through the LUTs of all groups.
    starts = np.arange(layout.groups)[:, None] << layer.bits
    return lookup.rows.reshape(layout.groups, -1).astype(np.int64) - starts


def _is_weight(value: Value, lookup: Lookup, palette: Palette) -> bool:
    """Whether ``value`` is the decoded weight, or those of its rows that were looked up."""
    weight = palette.dense()
    if lookup.source is not None:
        weight = weight[_tokens(lookup, lookup.source, palette)]
        if weight.size == value.array.size:  # a linear layer may take all rows as one matrix
            weight = weight.reshape(value.array.shape)
    if value.array.dtype.kind != "f" or value.array.shape != weight.shape:
        return False
    # Compare bits, not values: -0.0 equals 0.0. What float16 LUTs hold, both dtypes can.
    found = value.array.astype(np.float32)
    return np.array_equal(found.view(np.uint32), weight.view(np.uint32))


def _tokens(lookup: Lookup, source: Rows, palette: Palette) -> npt.NDArray[Any]:
    """The rows of the weight that were looked up."""
    layout = palette.layout
    if layout.axis or layout.dim == 1:
        return source.rows
    # ``dim`` rows share their indices: which of them is said by the element of the vector
    tokens: npt.NDArray[Any] = source.rows * layout.dim + lookup.rows[..., 0] % layout.dim
    return tokens
