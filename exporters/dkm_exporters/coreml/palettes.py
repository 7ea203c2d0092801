"""Decode the ``constexpr_lut_to_dense`` operations of a package, of iOS 16 and of iOS 18."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError

from dkm_export.errors import InvalidInput
from dkm_export.palette import MAX_DIM, Layout, Palette, unpack
from dkm_export.spec import Bits, Dim, Frozen
from dkm_exporters.coreml.package import Array, Operation, Package

LUT_TO_DENSE: Final = "constexpr_lut_to_dense"
LAYERS_KEY: Final = "dkm_export.layers"
"""User-defined metadata: JSON of `Layer` by the name of the operation that holds its palette."""


class Layer(Frozen):
    """What a palette is to the checkpoint; the operation itself cannot say all of it.

    Attributes:
        name: full parameter name; names in a program have no dots.
        bits: per index.
        dim: weights per index.
        axis: of the layout, which a palette of single weights has no use for.
    """

    name: str
    bits: Bits
    dim: Dim
    axis: Annotated[int, Field(ge=0)]


_LAYERS: Final = TypeAdapter(dict[str, Layer])


@dataclass(frozen=True, eq=False)
class Lut:
    """One ``constexpr_lut_to_dense``, in the terms of iOS 18.

    Attributes:
        table: ``[groups along each axis ..., entries, vector size]``.
        indices: uint8, of the rank of the weight.
        axis: along which the vectors lie, or None where they are single values.
    """

    table: Array
    indices: npt.NDArray[np.uint8]
    axis: int | None

    def dense(self) -> Array:
        """The decoded weight, in the table's dtype."""
        sizes, groups = self.indices.shape, self.table.shape
        tables = np.ix_(*(np.arange(n) // (n // g) for n, g in zip(sizes, groups, strict=False)))
        values = self.table[(*tables, self.indices)]
        axis = self.axis or 0
        shape = list(sizes)
        shape[axis] *= self.table.shape[-1]
        dense: Array = np.moveaxis(values, -1, axis + 1).reshape(shape)
        return dense


def read_lut(package: Package, operation: Operation) -> Lut:
    """The tables and indices of a ``constexpr_lut_to_dense``.

    Raises:
        InvalidInput: when they do not fit each other.
        Unsupported: when they are not constants in the file.
    """
    arguments = operation.arguments
    table, indices = (_constant(package, operation, name) for name in ("lut", "indices"))
    if "shape" in arguments:
        return _read_ios16(package, operation, table, indices)
    axis = None
    if "vector_axis" in arguments:
        given = _constant(package, operation, "vector_axis")
        if given.shape or not -indices.ndim <= given < indices.ndim:
            raise package.invalid(f"{operation.name}: vector_axis is not an axis of the indices")
        axis = int(given) % indices.ndim
    if table.ndim != indices.ndim + 2 or indices.dtype != np.uint8 or 0 in table.shape:
        raise package.invalid(f"{operation.name}: LUT {list(table.shape)} does not fit the indices")
    *groups, entries, size = table.shape
    if any(n == 0 or n % g for n, g in zip(indices.shape, groups, strict=True)):
        raise package.invalid(f"{operation.name}: LUT {list(table.shape)} does not fit the indices")
    if size > MAX_DIM or (size > 1 and axis is None):
        raise package.invalid(f"{operation.name}: vectors of {size} have no axis or are too long")
    if int(indices.max()) >= entries:
        raise package.invalid(f"{operation.name}: indices exceed the {entries} entries of the LUT")
    return Lut(table, indices, axis)


def read_palettes(path: Path) -> dict[str, Palette]:
    """Decode every palette of a package, by parameter name.

    In a package that this project did not write, the operations' outputs name the layers.

    Raises:
        InvalidInput: when the package is malformed.
        Unsupported: when a palette has no `Palette` equivalent.
    """
    package = Package(path)
    operations = {op.name: op for op in package.operations if op.kind == LUT_TO_DENSE}
    layers = _layers(package, operations)
    palettes = {}
    for name, operation in operations.items():
        lut = read_lut(package, operation)
        layer = layers.get(name)
        own, axis = (layer.name, layer.axis) if layer else (name, lut.axis or 0)
        palettes[own] = _palette(package, own, axis, lut)
    return palettes


def layers_metadata(layers: Mapping[str, Layer]) -> str:
    """The text for `LAYERS_KEY`."""
    return _LAYERS.dump_json(dict(sorted(layers.items()))).decode()


def _read_ios16(package: Package, operation: Operation, table: Array, packed: Array) -> Lut:
    bits = table.size.bit_length() - 1
    shape = tuple(int(n) for n in _constant(package, operation, "shape").reshape(-1))
    if not 1 <= bits <= 8 or table.shape != (1 << bits,) or not shape or 0 in shape:
        raise package.invalid(f"{operation.name}: LUT {list(table.shape)} is not of 2**bits values")
    try:
        indices = unpack(packed.reshape(-1), bits, math.prod(shape)).reshape(shape)
    except InvalidInput as error:
        raise package.invalid(f"{operation.name}: {error}") from error
    return Lut(table.reshape(*[1] * len(shape), -1, 1), indices, None)


def _constant(package: Package, operation: Operation, name: str) -> Array:
    match operation.arguments.get(name):
        case [np.ndarray() as value]:
            return value
    raise package.unsupported(f"{operation.name}: its {name} is not a constant")


def _layers(package: Package, operations: Mapping[str, Any]) -> dict[str, Layer]:
    try:
        layers = _LAYERS.validate_json(package.metadata.get(LAYERS_KEY, "{}"))
    except ValidationError as error:
        raise package.invalid(f"metadata '{LAYERS_KEY}' is malformed") from error
    if len({layer.name for layer in layers.values()}) < len(layers):
        raise package.invalid(f"metadata '{LAYERS_KEY}' names a layer twice")
    absent = sorted(layers.keys() - operations.keys())
    if absent:
        raise package.invalid(f"the palette of {layers[absent[0]].name} is missing")
    return layers


def _palette(package: Package, name: str, axis: int, lut: Lut) -> Palette:
    groups, entries, dim = lut.table.shape[0], *lut.table.shape[-2:]
    if math.prod(lut.table.shape[1:-2]) > 1:
        raise package.unsupported(f"{name}: groups along other axes than 0 are not known")
    with np.errstate(over="ignore"):
        table = lut.table.astype(np.float16)
    if not np.array_equal(table.astype(lut.table.dtype), lut.table):
        raise package.unsupported(f"{name}: its LUT is not representable in float16")
    if lut.axis not in (None, axis):
        raise package.invalid(f"{name}: vectors lie along axis {lut.axis}, not {axis}")
    shape = list(lut.indices.shape)
    try:
        shape[axis] *= dim
        layout = Layout(tuple(shape), dim, axis, groups)
        return Palette(
            entries.bit_length() - 1, layout, table.reshape(groups, entries, dim), lut.indices
        )
    except (InvalidInput, IndexError) as error:
        raise package.invalid(f"{name}: {error}") from error
