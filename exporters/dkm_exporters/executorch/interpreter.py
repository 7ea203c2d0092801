"""Runs what a program computes from constants alone, in numpy.

Only the handful of operators that a decode consists of are known; whatever else an instruction
computes is unknown, and so is the memory that it may have written to. Integers are the exception,
those of inputs too: they are made up, so that embeddings look up rows, of which any will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from executorch.exir.schema import (
    DelegateCall,
    Int,
    IntList,
    KernelCall,
    String,
    Tensor,
    TensorList,
)

from dkm_export.fields import Field
from dkm_exporters.executorch.program import ProgramFile, tensor_dtype

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows taken from a uint8 constant that is none of the tables of `Field`: ``packed[rows]``."""

    packed: Array
    rows: Array


@dataclass(frozen=True, eq=False)
class Lookup:
    """Vectors taken from a float16 constant: ``lut[rows]``.

    Attributes:
        lut: the constant.
        rows: which of its rows.
        source: the packed rows that these numbers come from, or None.
    """

    lut: Array
    rows: Array
    source: Rows | None


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that depends on constants alone.

    Attributes:
        array: its data.
        half: the float16 constant that it is, or was converted from.
        rows: the packed rows that its data comes from.
        lookup: where its data was looked up.
    """

    array: Array
    half: Array | None = None
    rows: Rows | None = None
    lookup: Lookup | None = None


@dataclass(frozen=True)
class Step:
    """One instruction.

    Attributes:
        tensors: all that it names, as in the file.
        takes: the known ones among those that it takes.
        result: what it computes, if known.
        delegate: index of the delegate that it calls, or None.
        into: what it copies the result into, or None.
    """

    tensors: list[Any]
    takes: list[Value]
    result: Value | None = None
    delegate: int | None = None
    into: Any = None


class Interpreter:
    """Follows the instructions of a method through its planned memory.

    Args:
        file: the program.
        method: name of the method.
        limit: bytes of results to remember; beyond that, the oldest become unknown.
        below: what made up integers stay below; they count up to it and start again.
    """

    def __init__(self, file: ProgramFile, method: str, limit: int, below: int) -> None:
        self._file = file
        self._plan = file.plan(method)
        self._limit = limit
        self._below = below
        self._memory: dict[tuple[int, int], Value] = {}
        for index in self._plan.inputs:
            self._make_up(self._plan.values[index].val)

    def _make_up(self, spec: Any) -> None:
        """Remember integers for a tensor of unknown ones."""
        dtype = tensor_dtype(spec) if isinstance(spec, Tensor) else None
        if dtype in (np.int32, np.int64) and nbytes(spec) <= self._limit:
            values = np.arange(math.prod(spec.sizes), dtype=dtype) % self._below
            self._remember(spec, Value(values.reshape(spec.sizes)))

    def steps(self) -> Iterator[Step]:
        """Run the instructions in order.

        Raises:
            InvalidInput: when a constant lies outside of the file.
            IndexError, AttributeError, ValueError: when the plan is malformed.
        """
        for chain in self._plan.chains:
            for instruction in chain.instructions:
                match instruction.instr_args:
                    case KernelCall():
                        yield self._step(instruction.instr_args)
                    case DelegateCall(delegate_index=index, args=arguments):
                        yield self._delegate(index, [self._plan.values[i].val for i in arguments])

    def _delegate(self, index: int, specs: list[Any]) -> Step:
        takes = [value for spec in specs if (value := self._argument(spec)) is not None]
        for spec in specs:  # which of them are outputs is not said
            self._forget(spec)
        tensors = [tensor for spec in specs for tensor in self._tensors(spec)]
        known = [value for value in takes if isinstance(value, Value)]
        return Step(tensors, known, delegate=index)

    def _step(self, call: Any) -> Step:
        operator = self._plan.operators[call.op_index].name
        values = [self._plan.values[index].val for index in call.args]
        if operator == _VIEW:  # where a shape is dynamic; as any view it stays in its place
            source, _, output = values
            if place(source) != place(output):
                raise ValueError("view")
            return Step([], [])
        if operator == _SIZE:
            return Step(self._tensors(values[0]), [])
        # Its output comes last: of an out variant twice, of a copy as its first argument too.
        *specs, _, output = values
        tensors = [tensor for spec in (*specs, output) for tensor in self._tensors(spec)]
        if operator == _COPY:
            specs = specs[1:]
        arguments = [self._argument(spec) for spec in specs]
        read = (self._read(tensor) for spec in specs for tensor in self._tensors(spec))
        takes = [value for value in read if value is not None]
        result = self._evaluate(operator, arguments, output)
        for spec in [output] if result is not None else [*specs, output]:
            self._forget(spec)
        if result is None:
            self._make_up(output)
        else:
            self._remember(output, result)
        return Step(tensors, takes, result, into=output if operator == _COPY else None)

    def _argument(self, spec: Any) -> Any:
        """A Value, a number, a text, a list of numbers, or None for all else."""
        match spec:
            case Int():
                return spec.int_val
            case String():
                return spec.string_val
            case IntList():
                return [self._plan.values[index].val.int_val for index in spec.items]
            case Tensor():
                return self._read(spec)
        return None

    def _read(self, tensor: Any) -> Value | None:
        constant = self._file.constant(tensor)
        if constant is not None:
            return Value(constant, half=constant if constant.dtype == np.float16 else None)
        known = self._memory.get(place(tensor))
        if known is None or known.array.dtype != tensor_dtype(tensor):
            return None
        if known.array.size != math.prod(tensor.sizes):
            return None
        # A view has no instruction: it is a tensor of another shape in the same place.
        return replace(known, array=known.array.reshape(tensor.sizes))

    def _evaluate(self, operator: str, arguments: list[Any], output: Any) -> Value | None:
        kernel = _KERNELS.get(operator)
        dtype = tensor_dtype(output) if isinstance(output, Tensor) else None
        if kernel is None or dtype is None or nbytes(output) > self._limit:
            return None
        if not isinstance(arguments[0], Value):
            return None  # it depends on an input
        try:
            array = np.empty(output.sizes, dtype)
            kernel(array, *(x.array if isinstance(x, Value) else x for x in arguments))
        except (AttributeError, IndexError, OverflowError, TypeError, ValueError):
            return None  # the arguments do not fit each other, or one of them is unknown
        first, *others = [x for x in arguments if isinstance(x, Value)]
        if operator == _EMBEDDING and first.half is not None:
            return Value(array, lookup=Lookup(first.half, others[0].array, others[0].rows))
        if operator == _EMBEDDING and _holds_packed_rows(first.array):
            return Value(array, rows=Rows(first.array, others[0].array))
        rows = [x.rows for x in (first, *others) if x.rows is not None]
        lookups = [x.lookup for x in (first, *others) if x.lookup is not None]
        half = first.half if operator == _CONVERT else None
        return Value(array, half, rows[0] if rows else None, lookups[0] if lookups else None)

    def _remember(self, tensor: Any, value: Value) -> None:
        self._memory[place(tensor)] = value
        while sum(known.array.nbytes for known in self._memory.values()) > self._limit:
            del self._memory[next(iter(self._memory))]

    def _forget(self, spec: Any) -> None:
        """Everything in the memory of a tensor, or of the tensors of a list, becomes unknown."""
        for tensor in self._tensors(spec):
            area, start = place(tensor)
            end = start + nbytes(tensor)
            self._memory = {
                (its_area, its_start): value
                for (its_area, its_start), value in self._memory.items()
                if its_area != area or its_start >= end or its_start + value.array.nbytes <= start
            }

    def _tensors(self, spec: Any) -> list[Any]:
        if isinstance(spec, TensorList):
            return [self._plan.values[index].val for index in spec.items]
        return [spec] if isinstance(spec, Tensor) else []


def _holds_packed_rows(table: Array) -> bool:
    """Whether a table that is looked up has packed indices: all but those that take bytes apart."""
    if table.dtype != np.uint8 or table.ndim != 2:
        return False
    width = 8 // table.shape[1] if table.shape[0] == 256 and table.shape[1] in (2, 4, 8) else 0
    fields = [Field(width, shift) for shift in range(0, 8, width)] if width else []
    return not any(np.array_equal(table, field.table()) for field in fields)


def place(tensor: Any) -> tuple[int, int]:
    """Memory area and offset; area 0 is that of constants, where nothing is remembered."""
    details = tensor.allocation_info
    return (details.memory_id, details.memory_offset) if details is not None else (0, 0)


def nbytes(tensor: Any) -> int:
    dtype = tensor_dtype(tensor)
    itemsize = 16 if dtype is None else dtype.itemsize  # none is larger
    count: int = math.prod(tensor.sizes)
    return count * itemsize


def _embedding(out: Array, table: Array, rows: Array, *_: object) -> None:
    if rows.min() < 0:
        raise IndexError("negative row")
    np.take(table, rows, axis=0, out=out)


def _convert(out: Array, source: Array, *_: object) -> None:
    np.copyto(out, source, casting="unsafe")


def _copy(out: Array, source: Array) -> None:
    np.copyto(out, source, casting="no")


def _add(out: Array, left: Array, right: Array, alpha: int) -> None:
    if alpha != 1:
        raise ValueError("alpha")
    np.add(left, right, out=out)


def _multiply(out: Array, left: Array, right: Array) -> None:
    np.multiply(left, right, out=out)


def _divide(out: Array, left: Array, right: Array, rounding: str) -> None:
    if rounding != "floor" or left.dtype.kind != "i" or not right.all():
        raise ValueError("rounding")
    np.floor_divide(left, right, out=out)


def _remainder(out: Array, left: Array, divisor: int) -> None:
    if left.dtype.kind != "i" or divisor < 1:
        raise ValueError("divisor")
    np.remainder(left, divisor, out=out)


def _unsqueeze(out: Array, source: Array, axis: int) -> None:
    np.copyto(out, np.expand_dims(source, axis), casting="no")


def _permute(out: Array, source: Array, order: list[int]) -> None:
    np.copyto(out, source.transpose(order), casting="no")


def _slice(out: Array, source: Array, axis: int, start: int, end: int, step: int) -> None:
    part = np.moveaxis(source, axis, 0)[start:end:step]
    np.copyto(out, np.moveaxis(part, 0, axis), casting="no")


_EMBEDDING = "aten::embedding"
_CONVERT = "dim_order_ops::_to_dim_order_copy"
_COPY = "aten::copy_"
_VIEW = "executorch_prim::et_view"
_SIZE = "aten::sym_size"
_KERNELS: dict[str, Callable[..., None]] = {
    _EMBEDDING: _embedding,
    _CONVERT: _convert,
    _COPY: _copy,
    "aten::add": _add,
    "aten::mul": _multiply,
    "aten::div": _divide,
    "aten::remainder": _remainder,
    "aten::unsqueeze_copy": _unsqueeze,
    "aten::permute_copy": _permute,
    "aten::slice_copy": _slice,
}
