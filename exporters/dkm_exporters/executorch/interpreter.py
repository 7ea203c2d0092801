"""Runs what a program computes from constants alone, in numpy.

Only the handful of operators that a decode consists of are known; whatever else an instruction
computes is unknown, and so is the memory that it may have written to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from executorch.exir.schema import Int, IntList, KernelCall, Tensor, TensorList

from dkm_exporters.executorch.program import ProgramFile, tensor_dtype

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Lookup:
    """Vectors taken from a float16 constant: ``lut[rows]``."""

    lut: Array
    rows: Array


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that depends on constants alone.

    Attributes:
        array: its data.
        half: the float16 constant that it is, or was converted from.
        lookup: where its data was looked up.
    """

    array: Array
    half: Array | None = None
    lookup: Lookup | None = None


@dataclass(frozen=True)
class Step:
    """One instruction: the known ones among the tensors it takes, and the result, if known."""

    takes: list[Value]
    result: Value | None


class Interpreter:
    """Follows the instructions of a method through its planned memory.

    Args:
        file: the program.
        method: name of the method.
        limit: bytes of results to remember; beyond that, the oldest become unknown.
    """

    def __init__(self, file: ProgramFile, method: str, limit: int) -> None:
        self._file = file
        self._plan = file.plan(method)
        self._limit = limit
        self._memory: dict[tuple[int, int], Value] = {}

    def steps(self) -> Iterator[Step]:
        """Run the instructions in order.

        Raises:
            InvalidInput: when a constant lies outside of the file.
            IndexError, AttributeError: when the plan is malformed.
        """
        for chain in self._plan.chains:
            for instruction in chain.instructions:
                if isinstance(instruction.instr_args, KernelCall):
                    yield self._step(instruction.instr_args)

    def _step(self, call: Any) -> Step:
        # An out variant takes its output last, and a second time as what it returns.
        *specs, output, _ = [self._plan.values[index].val for index in call.args]
        arguments = [self._argument(spec) for spec in specs]
        tensors = [tensor for spec in specs for tensor in self._tensors(spec)]
        takes = [value for value in map(self._read, tensors) if value is not None]
        result = self._evaluate(self._plan.operators[call.op_index].name, arguments, output)
        for spec in [output] if result is not None else [*specs, output]:
            self._forget(spec)
        if result is not None:
            self._remember(output, result)
        return Step(takes, result)

    def _argument(self, spec: Any) -> Any:
        """A Value, a number, a list of numbers, or None for all else."""
        match spec:
            case Int():
                return spec.int_val
            case IntList():
                return [self._plan.values[index].val.int_val for index in spec.items]
            case Tensor():
                return self._read(spec)
        return None

    def _read(self, tensor: Any) -> Value | None:
        constant = self._file.constant(tensor)
        if constant is not None:
            return Value(constant, half=constant if constant.dtype == np.float16 else None)
        known = self._memory.get(_place(tensor))
        if known is None or known.array.dtype != tensor_dtype(tensor):
            return None
        if known.array.size != math.prod(tensor.sizes):
            return None
        # A view has no instruction: it is a tensor of another shape in the same place.
        return Value(known.array.reshape(tensor.sizes), known.half, known.lookup)

    def _evaluate(self, operator: str, arguments: list[Any], output: Any) -> Value | None:
        kernel = _KERNELS.get(operator)
        dtype = tensor_dtype(output) if isinstance(output, Tensor) else None
        if kernel is None or dtype is None or _nbytes(output) > self._limit:
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
            return Value(array, lookup=Lookup(first.half, others[0].array))
        lookups = [x.lookup for x in (first, *others) if x.lookup is not None]
        half = first.half if operator == _CONVERT else None
        return Value(array, half, lookups[0] if lookups else None)

    def _remember(self, tensor: Any, value: Value) -> None:
        self._memory[_place(tensor)] = value
        while sum(known.array.nbytes for known in self._memory.values()) > self._limit:
            del self._memory[next(iter(self._memory))]

    def _forget(self, spec: Any) -> None:
        """Everything in the memory of a tensor, or of the tensors of a list, becomes unknown."""
        for tensor in self._tensors(spec):
            area, start = _place(tensor)
            end = start + _nbytes(tensor)
            self._memory = {
                (its_area, its_start): value
                for (its_area, its_start), value in self._memory.items()
                if its_area != area or its_start >= end or its_start + value.array.nbytes <= start
            }

    def _tensors(self, spec: Any) -> list[Any]:
        if isinstance(spec, TensorList):
            return [self._plan.values[index].val for index in spec.items]
        return [spec] if isinstance(spec, Tensor) else []


def _place(tensor: Any) -> tuple[int, int]:
    """Memory area and offset; area 0 is that of constants, where nothing is remembered."""
    details = tensor.allocation_info
    return (details.memory_id, details.memory_offset) if details is not None else (0, 0)


def _nbytes(tensor: Any) -> int:
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


def _add(out: Array, left: Array, right: Array, alpha: int) -> None:
    if alpha != 1:
        raise ValueError("alpha")
    np.add(left, right, out=out)


def _permute(out: Array, source: Array, order: list[int]) -> None:
    np.copyto(out, source.transpose(order), casting="no")


def _slice(out: Array, source: Array, axis: int, start: int, end: int, step: int) -> None:
    part = np.moveaxis(source, axis, 0)[start:end:step]
    np.copyto(out, np.moveaxis(part, 0, axis), casting="no")


_EMBEDDING = "aten::embedding"
_CONVERT = "dim_order_ops::_to_dim_order_copy"
_KERNELS: dict[str, Callable[..., None]] = {
    _EMBEDDING: _embedding,
    _CONVERT: _convert,
    "aten::add": _add,
    "aten::permute_copy": _permute,
    "aten::slice_copy": _slice,
}
