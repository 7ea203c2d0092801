"""Palettes read back from a program by running the decodes that it contains.

A list of which constant is whose would be one more thing that can be wrong: a doctored file could
show the reader one constant and run another. So the reader runs the instructions of ``forward``
that depend on constants alone. Indices are what the program looks up in a LUT, the LUT is where
it looks, and the weight that comes out must reach another instruction, bit for bit as the palette
gives it. Only the order in which parameters are decoded is taken from the header: with another
order, the palettes no longer agree with the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from dkm_export.errors import InvalidInput
from dkm_export.palette import Palette, packed_size
from dkm_export.validation import explain
from dkm_exporters.executorch.header import PALETTES_METHOD, Header
from dkm_exporters.executorch.interpreter import Interpreter, Lookup, Value
from dkm_exporters.executorch.program import ProgramFile


def read(path: Path) -> dict[str, Palette]:
    """The palettes of a program, by parameter name, without scales.

    Raises:
        InvalidInput: when the file is missing, truncated, malformed or contradicts itself.
    """
    file = ProgramFile(path)
    header = _read_header(file)
    palettes: dict[str, Palette] = {}
    for name, palette in zip(header.decodes, _decoded(file, header), strict=True):
        difference = palettes.setdefault(name, palette).difference(palette)
        if difference:
            raise InvalidInput(f"{path}: {name}: two of its decodes disagree: {difference}")
    return {name: palettes[name] for name in header.layers}


def _read_header(file: ProgramFile) -> Header:
    try:
        header = Header.model_validate_json(file.string(PALETTES_METHOD))
    except ValidationError as error:
        raise InvalidInput(f"{file.path}: {explain(error, Header)}") from error
    if set(header.decodes) != header.layers.keys():
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
class _Decode:
    """A palette that the program decodes, and whether it uses the weight."""

    palette: Palette
    used: bool = False


def _decoded(file: ProgramFile, header: Header) -> list[Palette]:
    """The palette of each of the header's decodes."""
    decodes: dict[Lookup, _Decode] = {}
    names = iter(header.decodes)
    try:
        for step in Interpreter(file, "forward", _memory_limit(file, header)).steps():
            for value in step.takes:
                if value.lookup is not None:
                    decode = decodes[value.lookup]
                    decode.used = decode.used or _is_weight(value, decode.palette)
            lookup = None if step.result is None else step.result.lookup
            if lookup is not None and lookup not in decodes:
                decodes[lookup] = _Decode(_palette(file, header, lookup, next(names, "")))
    except (IndexError, AttributeError, TypeError, ValueError) as error:
        raise InvalidInput(f"{file.path}: an instruction is malformed: export it again") from error
    for name, decode in zip_longest(header.decodes, decodes.values()):
        if decode is None or not decode.used:
            raise InvalidInput(
                f"{file.path}: {name}: the program does not compute this weight from a palette: "
                "export it again"
            )
    return [decode.palette for decode in decodes.values()]


def _memory_limit(file: ProgramFile, header: Header) -> int:
    """Bytes: four times the largest weight, which its decode stays below, and the file unpacked."""
    weights = max((layer.layout.vectors * layer.dim for layer in header.layers.values()), default=0)
    return 4 * (4 * weights + 4 * file.size)


def _palette(file: ProgramFile, header: Header, lookup: Lookup, name: str) -> Palette:
    layer = header.layers.get(name)
    if layer is None:
        raise InvalidInput(f"{file.path}: has more decodes than its header names")
    layout = layer.layout
    lut = lookup.lut.reshape(-1)
    count = layout.groups << layer.bits
    if lut.size != count * layout.dim or lookup.rows.size != layout.vectors:
        raise InvalidInput(
            f"{file.path}: {name}: {lookup.rows.size} indices into {lut.size} LUT entries, "
            f"expected {layout.vectors} into {count * layout.dim}"
        )
    # The program's indices count through the LUTs of all groups.
    starts = np.arange(layout.groups)[:, None] << layer.bits
    indices = lookup.rows.reshape(layout.groups, -1).astype(np.int64) - starts
    if (indices < 0).any() or (indices >> layer.bits).any():
        raise InvalidInput(f"{file.path}: {name}: indices exceed {layer.bits} bits")
    try:
        return Palette(
            layer.bits,
            layout,
            lut.reshape(layout.groups, -1, layout.dim).copy(),
            indices.astype(np.uint8).reshape(layout.index_shape),
        )
    except InvalidInput as error:
        raise InvalidInput(f"{file.path}: {name}: {error}") from error


def _is_weight(value: Value, palette: Palette) -> bool:
    """Whether ``value`` is the decoded weight."""
    if value.array.dtype != np.float32 or value.array.shape != palette.layout.shape:
        return False
    # Compare bits, not values: -0.0 equals 0.0.
    return np.array_equal(value.array.view(np.uint32), palette.dense().view(np.uint32))
