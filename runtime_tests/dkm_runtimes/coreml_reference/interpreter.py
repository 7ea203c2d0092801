"""Evaluate the program of a package, one operation after the other.

Bounds, whatever the package says: no tensor over 1 GiB, no more than 4 GiB of values at once, no
call of more than about a minute (`bounds`). A package that would exceed them is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dkm_export.checking.runtime import Arrays, NumericClass, Session
from dkm_export.errors import InvalidInput
from dkm_exporters.mlprogram.constants import DECODERS, decode_constants
from dkm_exporters.mlprogram.package import Constant, Operation, Package, Reference, TensorType
from dkm_runtimes.coreml_reference import arrangement, operators, recurrent, spatial
from dkm_runtimes.coreml_reference.bounds import (
    MOST_BYTES_TOGETHER,
    TooLarge,
    bounded,
    check_bytes,
    nbytes,
)
from dkm_runtimes.pixels import image_inputs, pixels

OPERATORS: Mapping[str, Callable[..., Any]] = {
    **operators.TABLE,
    **arrangement.TABLE,
    **recurrent.TABLE,
    **spatial.TABLE,
}

_VARIADIC = "values"
"""The parameter that takes several tensors, in every operator that has one."""

Value = Tensor | str | tuple[str | float, ...]


class ReferenceSession(Session):
    """A package with its constants decoded, in float32.

    Args:
        artifact: the ``.mlpackage``.
        rounding: round to float16 what the program declares as float16: its inputs and the results
            of each operation. Otherwise only its constants are.

    Raises:
        Unsupported: for an operator that is not in the table, with its output's name and place;
            for rounding, when the program has no float16; for constants that take too much memory.
        InvalidInput: when the package is malformed.
    """

    def __init__(self, artifact: Path, *, rounding: bool = False) -> None:
        self._package = Package(artifact)
        self._images = image_inputs(self._package)
        self._rounding = rounding
        if rounding and not self._package.float16:
            raise self._package.unsupported("the program is float32, so nothing would be rounded")
        self.numeric_class = NumericClass.FP16 if self._package.float16 else NumericClass.FP32
        self._operations = [op for op in self._package.operations if op.kind not in DECODERS]
        self._check_order()
        for operation in self._operations:
            self._check(operation)
        used = {name for operation in self._operations for name in operation.references}
        self._constants = self._decode(used.union(self._package.outputs))
        self._last_uses = self._find_last_uses()

    def run(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        """Evaluate the program.

        Returns:
            The outputs in the model's order: float32, int32 or bool; for a classifier, a string or
            number that is the label and the probabilities in the order of the labels.

        Raises:
            InvalidInput: when inputs are not the model's, or operands do not fit their operator.
            Unsupported: for arguments of an operator that are not known, or too much memory or
                work.
        """
        values = self._run(inputs)
        return [_array(values[name]) for name in self._package.outputs]

    def intermediates(self, inputs: Arrays) -> list[tuple[str, npt.NDArray[Any]]]:
        """Evaluate the program, and show what every operation gives.

        Raises:
            InvalidInput, Unsupported: as `run` does; more than 4 GiB in all are too much memory.
        """
        values = self._run(inputs, keep=True)
        names = [name for operation in self._operations for name in operation.outputs]
        return [(name, _array(values[name])) for name in names]

    def _run(self, inputs: Arrays, *, keep: bool = False) -> dict[str, Value]:
        """The values when the program has ended: outputs, and with ``keep`` all others."""
        values = {**self._constants, **self._checked_inputs(inputs)}
        used = sum(nbytes(value) for value in values.values())
        with torch.no_grad(), bounded():
            for operation, last_uses in zip(self._operations, self._last_uses, strict=True):
                results = self._evaluate(operation, values)
                used += sum(nbytes(value) for value in results.values())
                if used > MOST_BYTES_TOGETHER:
                    raise self._package.unsupported(
                        f"{_described(operation)}: more than 4 GiB of values"
                    )
                values.update(results)
                if not keep:
                    used -= sum(nbytes(values.pop(name)) for name in last_uses)
        return values

    def _check_order(self) -> None:
        """Nothing is used before it is computed, and every output is computed."""
        defined = set(self._package.inputs)
        for operation in self._package.operations:
            for name in operation.references - defined:
                if operation.kind in OPERATORS or operation.kind in DECODERS:
                    raise self._package.invalid(f"'{operation.name}' uses '{name}' too early")
            defined.update(operation.outputs)
        for name in self._package.outputs:
            if name not in defined:
                raise self._package.invalid(f"no operation computes the output '{name}'")

    def _check(self, operation: Operation) -> None:
        """Refuse at loading what `_evaluate` could not do."""
        if operation.kind not in OPERATORS:
            raise self._package.unsupported(f"{_described(operation)}, is not known")
        try:
            inspect.signature(OPERATORS[operation.kind]).bind(**operation.arguments)
        except TypeError as error:
            raise self._package.unsupported(f"{_described(operation)}: {error}") from error
        for name, given in operation.arguments.items():
            if len(given) != 1 and name != _VARIADIC:
                raise self._package.invalid(f"'{operation.name}' has {len(given)} values of {name}")

    def _decode(self, wanted: set[str]) -> dict[str, Value]:
        """The constants that operations use, as tensors."""
        constants: dict[str, Value] = {}
        used = 0
        for operation, decoded in decode_constants(self._package, wanted):
            if wanted.isdisjoint(operation.outputs):
                continue
            try:
                values = [_value(constant) for constant in decoded]
            except TooLarge as error:
                raise self._package.unsupported(f"'{operation.name}': {error}") from error
            used += sum(nbytes(value) for value in values)
            if used > MOST_BYTES_TOGETHER:
                raise self._package.unsupported(f"'{operation.name}': more than 4 GiB of constants")
            constants.update(self._named(operation, values))
        for name in self._package.outputs:
            if isinstance(constants.get(name), str | tuple):
                raise self._package.invalid(f"the output '{name}' is no tensor")
        return constants

    def _find_last_uses(self) -> list[list[str]]:
        """For each operation the names that are needed no more when it is done."""
        needed = {*self._package.outputs, *self._constants}
        last_uses = []
        for operation in reversed(self._operations):
            ending = operation.references.union(operation.outputs) - needed
            last_uses.append(sorted(ending))
            needed |= ending
        return last_uses[::-1]

    def _checked_inputs(self, inputs: Arrays) -> dict[str, Value]:
        types = self._package.inputs
        if inputs.keys() != types.keys():
            raise InvalidInput(
                f"inputs are {', '.join(sorted(inputs))}, expected {', '.join(types)}"
            )
        for name, expected in types.items():
            if not expected.fits(inputs[name].shape):
                raise InvalidInput(
                    f"input '{name}' has shape {list(inputs[name].shape)}, expected {expected}"
                )
        given = {
            name: pixels(x, self._images[name]) if name in self._images else x
            for name, x in inputs.items()
        }
        return {name: self._rounded(_tensor(given[name]), types[name]) for name in types}

    def _evaluate(self, operation: Operation, values: Mapping[str, Value]) -> dict[str, Value]:
        try:
            arguments: dict[str, Any] = {}
            for name, given in operation.arguments.items():
                operands = [
                    values[entry.name] if isinstance(entry, Reference) else _value(entry)
                    for entry in given
                ]
                arguments[name] = operands if name == _VARIADIC else operands[0]
            results = OPERATORS[operation.kind](**arguments)
        except TooLarge as error:
            raise self._package.unsupported(f"{_described(operation)}: {error}") from error
        except NotImplementedError as error:
            raise self._package.unsupported(
                f"{_described(operation)}: not known: {_first_line(error)}"
            ) from error
        except Exception as error:  # torch raises anything for operands that do not fit
            raise self._package.invalid(f"{_described(operation)}: {_first_line(error)}") from error
        return self._named(operation, results if isinstance(results, list) else [results])

    def _named(self, operation: Operation, results: Sequence[Value]) -> dict[str, Value]:
        """Results by output name; they must have the shapes that the program declares."""
        if len(results) != len(operation.outputs):
            raise self._package.invalid(f"'{operation.name}' has {len(operation.outputs)} outputs")
        for result, (name, declared) in zip(results, operation.outputs.items(), strict=True):
            if isinstance(result, Tensor) and not declared.fits(result.shape):
                raise self._package.invalid(
                    f"{operation.kind} '{name}' gives shape {list(result.shape)}, "
                    f"the program says {declared}"
                )
        return {
            name: self._rounded(result, declared)
            for result, (name, declared) in zip(results, operation.outputs.items(), strict=True)
        }

    def _rounded(self, value: Value, declared: TensorType) -> Value:
        if self._rounding and declared.float16 and isinstance(value, Tensor):
            return value.half().float()
        return value


def _value(constant: Constant) -> Value:
    if not isinstance(constant, np.ndarray):
        return constant
    check_bytes(constant.size * _dtype(constant).itemsize)
    return _tensor(constant)


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.astype(_dtype(array)))


def _dtype(array: npt.NDArray[Any]) -> np.dtype[Any]:
    """float32 for all floating point types, int64 for all integers, and bool."""
    return np.dtype({"f": np.float32, "b": np.bool_}.get(array.dtype.kind, np.int64))


def _array(value: Value) -> npt.NDArray[Any]:
    if not isinstance(value, Tensor):
        return np.array(value)
    return (value.int() if value.dtype == torch.int64 else value).contiguous().numpy()


def _described(operation: Operation) -> str:
    return f"operator '{operation.kind}' of '{operation.name}', {operation.place}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
