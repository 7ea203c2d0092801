"""Decode the ``constexpr_lut_to_dense`` operations of a package, of iOS 16 and of iOS 18."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Final

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError

from dkm_export.errors import DkmError, InvalidInput
from dkm_export.palette import Layout, Palette
from dkm_export.spec import Bits, Dim, Frozen
from dkm_exporters.mlprogram.constants import (
    LUT_TO_DENSE,
    SHIFT_SCALE,
    Arguments,
    Constants,
    Lut,
    Memory,
    read_lut,
)
from dkm_exporters.mlprogram.package import Operation, Package, Reference

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


def read_palettes(package: Package) -> dict[str, Palette]:
    """Decode every palette of a package, by parameter name, in the order of its operations.

    In a package that this project did not write, the operations' outputs name the layers. What
    scales a decoded weight, as coremltools does per channel, is the palette's scale.

    Raises:
        InvalidInput: when the package is malformed.
        Unsupported: when a palette has no `Palette` equivalent.
    """
    layers, reader = layer_names(package), _Reader(package)
    found = {}
    for name, operation in _lookups(package).items():
        layer = layers.get(name)
        found[layer.name if layer else name] = reader.read(operation, layer)
    return found


def palettes_of_any(package: Package) -> tuple[dict[str, Palette], dict[str, str]]:
    """The palettes of a package of any tool, as far as they go.

    Returns:
        Those that `Palette` can express, and why it cannot express the others, by the names of the
        operations that give the weights: what scales a palette, or what decodes it.
    """
    palettes, refused = {}, {}
    reader = _Reader(package)
    for name, operation in _lookups(package).items():
        scaling = reader.scalings.get(name)
        weight = scaling.name if scaling else name
        try:
            palettes[weight] = reader.read(operation)
        except DkmError as error:
            texts = (str(error).partition(f"{x}: ")[2] for x in dict.fromkeys((name, weight)))
            refused[weight] = next(filter(None, texts), str(error))
    return palettes, refused


def _lookups(package: Package) -> dict[str, Operation]:
    return {op.name: op for op in package.operations if op.kind == LUT_TO_DENSE}


class _Reader:
    """Decodes the palettes of a package.

    All together they take at most eight times the memory of its files: of each bit of an index, a
    byte. Operations that share a part of the files count it each.

    Attributes:
        scalings: what scales a decoded weight, by the name of the operation that decodes it.
    """

    def __init__(self, package: Package) -> None:
        self.scalings = {
            reference.name: operation
            for operation in package.operations
            if operation.kind == SHIFT_SCALE
            for reference in operation.arguments.get("data", [])
            if isinstance(reference, Reference)
        }
        self._package = package
        self._memory = Memory(8 * package.nbytes, "eight times the memory of the files")
        self._constants = Constants(package, self._memory)

    def read(self, operation: Operation, layer: Layer | None = None) -> Palette:
        """The palette of an operation, with its scale.

        Raises:
            InvalidInput: when its arguments do not fit each other.
            Unsupported: when it has no `Palette` equivalent, or takes too much memory.
        """
        package, scaling = self._package, self.scalings.get(operation.name)
        self._constants.require(operation.references)
        arguments = Arguments(package, operation, self._constants.known)
        self._memory.take(arguments)
        lut = read_lut(arguments)
        self._memory.take(arguments, lut.indices.nbytes + lut.table.nbytes)
        name, axis = (layer.name, layer.axis) if layer else (operation.name, lut.axis or 0)
        palette = _palette(package, name, axis, lut)
        if scaling is None:
            return palette
        self._constants.require(scaling.references - {operation.name})
        scale = _scale(Arguments(package, scaling, self._constants.known), palette)
        self._memory.take(arguments, scale.nbytes)
        return replace(palette, scale=scale)


def layers_metadata(operations: Mapping[str, str], palettes: Mapping[str, Palette]) -> str:
    """The text for `LAYERS_KEY`.

    Args:
        operations: parameter name by the name of the operation that decodes its palette.
        palettes: by parameter name.
    """
    layers = {}
    for operation, name in sorted(operations.items()):
        layout = palettes[name].layout
        layers[operation] = Layer(
            name=name, bits=palettes[name].bits, dim=layout.dim, axis=layout.axis
        )
    return _LAYERS.dump_json(layers).decode()


def layer_names(package: Package) -> dict[str, Layer]:
    """What `LAYERS_KEY` says, by the name of an operation; nothing where we did not write it.

    Raises:
        InvalidInput: when it is malformed, or names a palette that there is not.
    """
    operations = _lookups(package)
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


def _scale(arguments: Arguments, palette: Palette) -> npt.NDArray[np.float32]:
    """What multiplies the decoded weight: one number per element or for all along an axis."""
    scale, shape = arguments.numbers("scale"), palette.layout.shape
    if "offset" in arguments:
        raise arguments.unsupported("a palette with an offset is not known")
    if scale.ndim != len(shape) or any(
        count not in (1, size) for count, size in zip(scale.shape, shape, strict=True)
    ):
        raise arguments.unsupported("a palette with a scale per block is not known")
    return arguments.wide(scale)
