"""Decode the constants of a program: ``const``, and ``constexpr_`` operations of iOS 16 and 18.

Semantics: ``coremltools.converters.mil.mil.ops.defs``, ``iOS16/constexpr_ops.py`` and
``iOS18/compression.py``. In iOS 18 one of them may be an argument of another. Products are computed
in float32 and rounded once, to the type that the operation gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from dkm_export.errors import DkmError, InvalidInput, Unsupported
from dkm_export.palette import MAX_DIM, unpack
from dkm_exporters.mlprogram.package import Array, Constant, Operation, Package, Reference

LUT_TO_DENSE: Final = "constexpr_lut_to_dense"
SHIFT_SCALE: Final = "constexpr_blockwise_shift_scale"

_MOST_BYTES: Final = 1 << 30
"""Of one decoded constant: few bytes of indices and long vectors may stand for very many."""

_MOST_BYTES_TOGETHER: Final = 1 << 32


@dataclass
class Memory:
    """What may still be decoded.

    Attributes:
        left: in bytes. Below 0 it was too much, and nothing more is decoded.
        limit: in words.
    """

    left: int
    limit: str

    def take(self, arguments: Arguments, nbytes: int = 0) -> None:
        """Account for what an operation was decoded to.

        Raises:
            Unsupported: when so many bytes are not left.
        """
        self.left -= nbytes
        if self.left < 0:
            raise arguments.unsupported(f"decoded weights take more than {self.limit}")


@dataclass(frozen=True, eq=False)
class Lut:
    """Tables and the indices into them, in the terms of iOS 18.

    Attributes:
        table: ``[groups along each axis ..., entries, vector size]``.
        indices: uint8, of the rank of the weight.
        axis: along which the vectors lie, or None where they are single values.
    """

    table: Array
    indices: npt.NDArray[np.uint8]
    axis: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded weight."""
        return int(self.indices.size * self.table.shape[-1] * self.table.itemsize)

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


class Arguments:
    """The arguments of a constant operation, and errors that name it.

    Args:
        package: where it is.
        operation: the operation.
        known: the constants before it, by name.
    """

    def __init__(
        self, package: Package, operation: Operation, known: Mapping[str, Constant]
    ) -> None:
        self._package = package
        self._operation = operation
        self._known = known

    def __contains__(self, name: str) -> bool:
        return name in self._operation.arguments

    def constant(self, name: str) -> Constant:
        """The value of an argument.

        Raises:
            Unsupported: when it is missing or not a constant.
        """
        match self._operation.arguments.get(name):
            case [Reference() as reference]:
                value = self._known.get(reference.name)
            case [value]:
                pass
            case _:
                value = None
        if value is None:
            raise self.unsupported(f"its {name} is not a constant")
        return value

    def array(self, name: str) -> Array:
        """The value of an argument that is an array.

        Raises:
            InvalidInput: when it is none.
            Unsupported: when it is missing or not a constant.
        """
        value = self.constant(name)
        if not isinstance(value, np.ndarray):
            raise self.invalid(f"{name} is not a tensor")
        return value

    def numbers(self, name: str) -> Array:
        """`array`, which must not hold truth values."""
        value = self.array(name)
        if value.dtype == np.bool_:
            raise self.invalid(f"{name} is not numeric")
        return value

    def optional(self, name: str) -> Array | None:
        """`numbers`, or None where the argument is left out."""
        return self.numbers(name) if name in self else None

    def wide(self, values: Array) -> npt.NDArray[np.float32]:
        """An argument as float32, which is exact for all types of at most 16 bits."""
        self.check_size(4 * values.size)
        return values.astype(np.float32)

    def check_size(self, nbytes: int) -> None:
        """Refuse to decode what would take too much memory."""
        if nbytes > _MOST_BYTES:
            raise self.unsupported("it takes more than 1 GiB when decoded")

    def axis(self, name: str, rank: int) -> int:
        """The value of an argument that is an axis, counted from the front."""
        value = self.array(name)
        if value.shape or value.dtype.kind not in "iu" or not -rank <= value < rank:
            raise self.invalid(f"{name} is not an axis")
        return int(value) % rank

    def shape(self, name: str) -> tuple[int, ...]:
        """The value of an argument that is a shape without zeros."""
        value = self.array(name)
        if value.dtype.kind not in "iu" or value.ndim != 1 or not 1 <= value.size <= 32:
            raise self.invalid(f"{name} is not a shape")
        sizes = tuple(int(size) for size in value)
        if min(sizes) < 1:
            raise self.invalid(f"{name} is not a shape")
        return sizes

    def invalid(self, problem: str) -> InvalidInput:
        """An error that names the operation, to be raised."""
        return self._package.invalid(f"{self._operation.name}: {problem}")

    def unsupported(self, problem: str) -> Unsupported:
        """An error that names the operation, to be raised."""
        return self._package.unsupported(f"{self._operation.name}: {problem}")


def decode_constants(
    package: Package, wanted: Collection[str]
) -> Iterator[tuple[Operation, list[Constant]]]:
    """Decode the constants that are wanted, and those that these are made of.

    Args:
        package: the program.
        wanted: names of values; those that are no constants are passed over.

    Yields:
        Each constant operation that is needed, in order, and the values of its outputs.

    Raises:
        InvalidInput: when arguments do not fit each other.
        Unsupported: when arguments are not constants, or decoding would take more than 1 GiB for
            one value or 4 GiB for all.
    """
    needed, parts = set(wanted), set[str]()
    for operation in reversed(package.operations):
        if operation.kind in DECODERS and not needed.isdisjoint(operation.outputs):
            parts |= operation.references
            needed |= operation.references
    known: dict[str, Constant] = {}
    memory = Memory(_MOST_BYTES_TOGETHER, "4 GiB")
    for operation in package.operations:
        if operation.kind not in DECODERS or needed.isdisjoint(operation.outputs):
            continue
        values = _decode(Arguments(package, operation, known), operation, memory)
        yield operation, [*values.values()]
        known.update((name, value) for name, value in values.items() if name in parts)


def _decode(arguments: Arguments, operation: Operation, memory: Memory) -> dict[str, Constant]:
    """The values of an operation by the names of its outputs."""
    memory.take(arguments)
    with np.errstate(all="ignore"):
        values = DECODERS[operation.kind](arguments)
    if len(values) != len(operation.outputs):
        raise arguments.invalid(f"it has {len(operation.outputs)} outputs")
    if operation.kind != "const":  # which needs no memory of its own
        arrays = (value for value in values if isinstance(value, np.ndarray))
        memory.take(arguments, sum(array.nbytes for array in arrays))
    return dict(zip(operation.outputs, values, strict=True))


class Constants:
    """The constants of a program, each decoded when it is first needed, and never again.

    Args:
        package: the program.
        memory: that they may take.

    Attributes:
        known: what is decoded, by name.
    """

    def __init__(self, package: Package, memory: Memory) -> None:
        self.known: dict[str, Constant] = {}
        self._package, self._memory = package, memory
        self._failed: dict[str, DkmError] = {}
        self._made = {
            output: number
            for number, operation in enumerate(package.operations)
            if operation.kind in DECODERS
            for output in operation.outputs
        }

    def require(self, wanted: Collection[str]) -> None:
        """Decode what is wanted and a constant, and what that is made of.

        Raises:
            InvalidInput: when arguments do not fit each other.
            Unsupported: when arguments are not constants, or there is not enough memory.
        """
        needed, left = set[int](), list(wanted)
        while left:
            name = left.pop()
            number = self._made.get(name)
            done = name in self.known or name in self._failed
            if number is not None and number not in needed and not done:
                needed.add(number)
                left.extend(self._package.operations[number].references)
        for number in sorted(needed):
            self._add(self._package.operations[number])
        for name in sorted(self._failed.keys() & wanted):
            raise self._failed[name].with_traceback(None)

    def _add(self, operation: Operation) -> None:
        """Decode one operation, or note why that cannot be done."""
        arguments = Arguments(self._package, operation, self.known)
        try:
            for name in sorted(operation.references & self._failed.keys()):
                raise self._failed[name].with_traceback(None)
            self.known.update(_decode(arguments, operation, self._memory))
        except DkmError as error:
            self._failed.update(dict.fromkeys(operation.outputs, error))


def read_lut(arguments: Arguments) -> Lut:
    """The tables and indices of a ``constexpr_lut_to_dense``.

    Raises:
        InvalidInput: when they do not fit each other.
        Unsupported: when they are not constants.
    """
    table, indices = arguments.numbers("lut"), arguments.numbers("indices")
    if "shape" in arguments:
        return _read_ios16(arguments, table, indices)
    return _checked_lut(arguments, table, indices)


def _checked_lut(arguments: Arguments, table: Array, indices: Array) -> Lut:
    axis = arguments.axis("vector_axis", indices.ndim) if "vector_axis" in arguments else None
    if table.ndim != indices.ndim + 2 or indices.dtype != np.uint8 or 0 in table.shape:
        raise arguments.invalid(f"LUT {list(table.shape)} does not fit the indices")
    *groups, entries, size = table.shape
    if any(n == 0 or n % g for n, g in zip(indices.shape, groups, strict=True)):
        raise arguments.invalid(f"LUT {list(table.shape)} does not fit the indices")
    if size > MAX_DIM or (size > 1 and axis is None):
        raise arguments.invalid(f"vectors of {size} have no axis or are too long")
    if int(indices.max()) >= entries:
        raise arguments.invalid(f"indices exceed the {entries} entries of the LUT")
    return Lut(table, indices, axis)


def _read_ios16(arguments: Arguments, table: Array, packed: Array) -> Lut:
    bits = table.size.bit_length() - 1
    shape = arguments.shape("shape")
    if not 1 <= bits <= 8 or table.shape != (1 << bits,):
        raise arguments.invalid(f"LUT {list(table.shape)} is not of 2**bits values")
    indices = _unpacked(arguments, packed, bits, shape)
    return Lut(table.reshape(*[1] * len(shape), -1, 1), indices, None)


def _unpacked(
    arguments: Arguments, packed: Array, bits: int, shape: tuple[int, ...]
) -> npt.NDArray[np.uint8]:
    """What iOS 16 packs itself into an array of bytes."""
    if packed.dtype != np.uint8:
        raise arguments.invalid("packed values are not uint8")
    try:
        return unpack(packed.reshape(-1), bits, math.prod(shape)).reshape(shape)
    except InvalidInput as error:
        raise arguments.invalid(str(error)) from error


def _const(arguments: Arguments) -> list[Constant]:
    return [arguments.constant("val")]


def _cast(arguments: Arguments) -> list[Constant]:
    if arguments.constant("output_dtype") != "fp32":
        raise arguments.unsupported("its output_dtype is not fp32")
    return [arguments.wide(arguments.numbers("source_val"))]


def _affine_dequantize(arguments: Arguments) -> list[Constant]:
    data = arguments.numbers("quantized_data")
    axis = arguments.axis("axis", data.ndim)

    def along_axis(values: Array) -> npt.NDArray[np.float32]:
        if values.ndim > 1 or values.size not in (1, data.shape[axis]):
            raise arguments.invalid("scale or zero_point does not fit its axis")
        shape = [-1 if index == axis else 1 for index in range(data.ndim)]
        return arguments.wide(values).reshape(shape)

    scale, zero_point = arguments.numbers("scale"), arguments.numbers("zero_point")
    values = (arguments.wide(data) - along_axis(zero_point)) * along_axis(scale)
    return [values.astype(scale.dtype)]


def _lut_to_dense(arguments: Arguments) -> list[Constant]:
    return [_dense(arguments, read_lut(arguments))]


def _dense(arguments: Arguments, lut: Lut) -> Array:
    arguments.check_size(lut.nbytes)
    return lut.dense()


def _sparse_to_dense(arguments: Arguments) -> list[Constant]:
    mask = arguments.numbers("mask")
    if "shape" in arguments:
        mask = _unpacked(arguments, mask, 1, arguments.shape("shape"))
    return [_filled(arguments, mask, arguments.numbers("nonzero_data"))]


def _lut_to_sparse(arguments: Arguments) -> list[Constant]:
    mask = arguments.numbers("indices_mask")
    indices = _filled(arguments, mask, arguments.numbers("indices_nonzero_data"))
    lut = _checked_lut(arguments, arguments.numbers("lut"), indices)
    dense = _dense(arguments, lut)
    if lut.axis is not None:
        mask = np.repeat(mask, lut.table.shape[-1], lut.axis)
    return [mask, dense[mask != 0]]


def _shift_scale(arguments: Arguments) -> list[Constant]:
    return [_scaled(arguments, arguments.numbers("data"))]


def _sparse_shift_scale(arguments: Arguments) -> list[Constant]:
    mask = arguments.numbers("data_mask")
    data = _filled(arguments, mask, arguments.numbers("nonzero_data"))
    return [mask, _scaled(arguments, data)[mask != 0]]


def _filled(arguments: Arguments, mask: Array, values: Array) -> Array:
    """``values`` where the mask is set, and 0 elsewhere."""
    if values.ndim != 1 or values.size != np.count_nonzero(mask):
        raise arguments.invalid(f"its mask does not select {values.size} elements")
    arguments.check_size(mask.size * values.itemsize)
    filled = np.zeros(mask.shape, values.dtype)
    filled[mask != 0] = values
    return filled


def _scaled(arguments: Arguments, data: Array) -> Array:
    """``scale * (data - offset)``, of which there is one each per block."""

    def repeated(blocks: Array) -> Array:
        if blocks.ndim != data.ndim or any(
            b == 0 or n % b for n, b in zip(data.shape, blocks.shape, strict=True)
        ):
            raise arguments.invalid(
                f"scale or offset {list(blocks.shape)} does not fit the data {list(data.shape)}"
            )
        wide = arguments.wide(blocks)
        for axis, (size, count) in enumerate(zip(data.shape, blocks.shape, strict=True)):
            wide = wide if count == 1 else np.repeat(wide, size // count, axis)
        return wide

    scale, offset = arguments.numbers("scale"), arguments.optional("offset")
    values = arguments.wide(data)
    if offset is not None:
        values = values - repeated(offset)
    scaled: Array = (values * repeated(scale)).astype(scale.dtype)
    return scaled


DECODERS: Final[Mapping[str, Callable[[Arguments], list[Constant]]]] = {
    "const": _const,
    "constexpr_affine_dequantize": _affine_dequantize,
    SHIFT_SCALE: _shift_scale,
    "constexpr_cast": _cast,
    LUT_TO_DENSE: _lut_to_dense,
    "constexpr_lut_to_sparse": _lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": _sparse_shift_scale,
    "constexpr_sparse_to_dense": _sparse_to_dense,
}
"""What decodes a constant operation, by operator."""
