"""Evaluate the program of a package, one operation after the other."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dkm_export.checking.runtime import Arrays, NumericClass, Session
from dkm_export.errors import InvalidInput
from dkm_exporters.coreml.package import Array, Operation, Package, Reference
from dkm_exporters.coreml.palettes import LUT_TO_DENSE, read_lut
from dkm_runtimes.coreml_reference import operators, spatial

_OPERATORS = {**operators.TABLE, **spatial.TABLE}

_VARIADIC = "values"
"""The parameter that takes several tensors, in every operator that has one."""

Value = Tensor | str


class ReferenceSession(Session):
    """A package with its constants decoded.

    Args:
        artifact: the ``.mlpackage``.

    Raises:
        Unsupported: for an operator that is not in the table, with its output's name.
        InvalidInput: when the package is malformed.
    """

    def __init__(self, artifact: Path) -> None:
        self._package = Package(artifact)
        self.numeric_class = NumericClass.FP16 if self._package.float16 else NumericClass.FP32
        self._constants: dict[str, Value] = {}
        self._operations: list[Operation] = []
        defined = set(self._package.inputs)
        for operation in self._package.operations:
            if operation.kind == LUT_TO_DENSE:
                weight = _tensor(read_lut(self._package, operation).dense())
                self._constants.update(self._named(operation, [weight]))
            elif operation.kind == "const":
                self._constants[operation.name] = self._constant(operation)
            else:
                self._check(operation, defined)
                self._operations.append(operation)
            defined.update(operation.outputs)
        for name in self._package.outputs:
            if name not in defined or isinstance(self._constants.get(name), str):
                raise self._package.invalid(f"no operation computes the output '{name}'")

    def run(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        """Evaluate the program.

        Returns:
            The outputs in the model's order: float32, int32 or bool.

        Raises:
            InvalidInput: when inputs are not the model's, or operands do not fit their operator.
        """
        if inputs.keys() != self._package.inputs.keys():
            expected = ", ".join(self._package.inputs)
            raise InvalidInput(f"inputs are {', '.join(sorted(inputs))}, expected {expected}")
        for name, shape in self._package.inputs.items():
            if shape not in (None, inputs[name].shape):
                raise InvalidInput(
                    f"input '{name}' has shape {list(inputs[name].shape)}, expected {list(shape)}"
                )
        values = dict(self._constants)
        values.update({name: _tensor(array) for name, array in inputs.items()})
        with torch.no_grad():
            for operation in self._operations:
                values.update(self._evaluate(operation, values))
        return [_array(values[name]) for name in self._package.outputs]

    def _constant(self, operation: Operation) -> Value:
        match operation.arguments.get("val"):
            case [str() | np.ndarray() as value]:
                return _value(value)
        raise self._package.invalid(f"const '{operation.name}' has no value")

    def _check(self, operation: Operation, defined: set[str]) -> None:
        """Refuse at loading what `_evaluate` could not do."""
        if operation.kind not in _OPERATORS:
            raise self._package.unsupported(
                f"operator '{operation.kind}' of '{operation.name}' is not known"
            )
        try:
            inspect.signature(_OPERATORS[operation.kind]).bind(**operation.arguments)
        except TypeError as error:
            raise self._package.unsupported(
                f"operator '{operation.kind}' of '{operation.name}': {error}"
            ) from error
        for name, given in operation.arguments.items():
            if len(given) != 1 and name != _VARIADIC:
                raise self._package.invalid(f"'{operation.name}' has {len(given)} values of {name}")
            for entry in given:
                if isinstance(entry, Reference) and entry.name not in defined:
                    raise self._package.invalid(f"'{operation.name}' uses '{entry.name}' too early")

    def _evaluate(self, operation: Operation, values: Mapping[str, Value]) -> dict[str, Value]:
        arguments: dict[str, Any] = {}
        for name, given in operation.arguments.items():
            operands = [
                values[entry.name] if isinstance(entry, Reference) else _value(entry)
                for entry in given
            ]
            arguments[name] = operands if name == _VARIADIC else operands[0]
        try:
            results = _OPERATORS[operation.kind](**arguments)
        except Exception as error:  # torch raises anything for operands that do not fit
            problem = str(error).partition("\n")[0]
            raise self._package.invalid(
                f"{operation.kind} '{operation.name}': {problem}"
            ) from error
        return self._named(operation, results if isinstance(results, list) else [results])

    def _named(self, operation: Operation, results: list[Tensor]) -> dict[str, Value]:
        """Results by output name; they must have the shapes that the program declares."""
        if len(results) != len(operation.outputs):
            raise self._package.invalid(f"'{operation.name}' has {len(operation.outputs)} outputs")
        for result, (name, shape) in zip(results, operation.outputs.items(), strict=True):
            if shape not in (None, tuple(result.shape)):
                raise self._package.invalid(
                    f"{operation.kind} '{name}' gives shape {list(result.shape)}, "
                    f"the program says {list(shape)}"
                )
        return dict(zip(operation.outputs, results, strict=True))


def _value(argument: Array | str) -> Value:
    return argument if isinstance(argument, str) else _tensor(argument)


def _tensor(array: Array) -> Tensor:
    """float32 for all floating point types, int64 for all integers, and bool."""
    kinds = {"f": "float32", "b": "bool"}
    return torch.from_numpy(array.astype(kinds.get(array.dtype.kind, "int64")))


def _array(value: Value) -> npt.NDArray[Any]:
    assert isinstance(value, Tensor)
    return (value.int() if value.dtype == torch.int64 else value).contiguous().numpy()
