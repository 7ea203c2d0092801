"""Read a saved ``.mlpackage`` as data: its files, its program and the values in ``weight.bin``.

Nothing here runs Core ML or trusts the package: no path leaves its folder, and every offset and
size is checked against the bytes that are there. Formats: ``Manifest.json``, ``Model.proto`` and
``MIL.proto`` of coremltools 9.0, and the storage format of its ``mlmodel/src/MILBlob``.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from coremltools.proto import MIL_pb2, Model_pb2
from google.protobuf.message import DecodeError

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.palette import packed_size, unpack

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

_MODEL_FOLDER: Final = "@model_path/"
_SENTINEL: Final = 0xDEADBEEF
_RECORD: Final = struct.Struct("<IIQQQ")
"""Sentinel, data type, bytes, offset of the data, unused bits at the end; then reserved bytes."""


@dataclass(frozen=True)
class _DataType:
    """How values of a MIL data type are stored.

    Attributes:
        dtype: of the array they are read into.
        bits: per value in packed bytes, or None where they are never packed.
        blob: number of the type in ``weight.bin``, or None where it is never there.
        field: of ``TensorValue``, for values inside the model file.
    """

    dtype: type[np.generic]
    bits: int | None
    blob: int | None
    field: str


_DATA_TYPES: Final = {
    MIL_pb2.BOOL: _DataType(np.bool_, None, None, "bools"),
    MIL_pb2.FLOAT16: _DataType(np.float16, 16, 1, "bytes"),
    MIL_pb2.FLOAT32: _DataType(np.float32, 32, 2, "floats"),
    MIL_pb2.INT8: _DataType(np.int8, 8, 4, "bytes"),
    MIL_pb2.INT16: _DataType(np.int16, 16, 6, "ints"),
    MIL_pb2.INT32: _DataType(np.int32, 32, 14, "ints"),
    MIL_pb2.INT64: _DataType(np.int64, None, None, "longInts"),
    MIL_pb2.UINT1: _DataType(np.uint8, 1, 9, "bytes"),
    MIL_pb2.UINT2: _DataType(np.uint8, 2, 10, "bytes"),
    MIL_pb2.UINT3: _DataType(np.uint8, 3, 12, "bytes"),
    MIL_pb2.UINT4: _DataType(np.uint8, 4, 11, "bytes"),
    MIL_pb2.UINT6: _DataType(np.uint8, 6, 13, "bytes"),
    MIL_pb2.UINT8: _DataType(np.uint8, 8, 3, "bytes"),
    MIL_pb2.UINT16: _DataType(np.uint16, 16, 7, "ints"),
    MIL_pb2.UINT32: _DataType(np.uint32, 32, 15, "bytes"),
}


@dataclass(frozen=True)
class Reference:
    """An argument that is the output of an earlier operation or an input of the program."""

    name: str


Argument = Reference | Array | str


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of the program.

    Attributes:
        kind: operator, such as ``conv``.
        arguments: inputs and attributes by parameter name; several for a variadic parameter.
        outputs: names, and shapes where they are fixed.
    """

    kind: str
    arguments: dict[str, list[Argument]]
    outputs: dict[str, Shape | None]

    @property
    def name(self) -> str:
        """Name of the first output, which is unique in the program."""
        return next(iter(self.outputs))


class Package:
    """The main function of an ML program with fixed shapes.

    Attributes:
        path: the ``.mlpackage``.
        metadata: the model's user-defined metadata.
        inputs: names in order, and shapes where they are fixed.
        outputs: names, in order.
        float16: whether any operation gives float16.
        operations: in order of execution.

    Raises:
        InvalidInput: when the package is malformed.
        Unsupported: when it holds something other than an ML program, or unknown data types.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        model_file = self._model_file()
        self._model_folder = model_file.parent.relative_to(path.resolve())
        self._weights: dict[str, npt.NDArray[np.uint8]] = {}
        model = Model_pb2.Model()
        try:
            model.ParseFromString(model_file.read_bytes())
        except DecodeError as error:
            raise self.invalid(f"{model_file.name} is not a Core ML model") from error
        self.metadata = dict(model.description.metadata.userDefined)
        function, block = self._main(model)
        self.inputs = {entry.name: _shape(entry.type.tensorType) for entry in function.inputs}
        self.outputs = list(block.outputs)
        computed = [output for operation in block.operations for output in operation.outputs]
        if len({*self.inputs, *(output.name for output in computed)}) < (
            len(function.inputs) + len(computed)
        ):
            raise self.invalid("the program defines a name twice")
        self.float16 = any(o.type.tensorType.dataType == MIL_pb2.FLOAT16 for o in computed)
        self.operations = [self._operation(operation) for operation in block.operations]

    def invalid(self, problem: str) -> InvalidInput:
        """An error that names the package, to be raised."""
        return InvalidInput(f"{self.path}: {_printable(problem)}: export it again")

    def unsupported(self, problem: str) -> Unsupported:
        """An error that names the package, to be raised."""
        return Unsupported(f"{self.path}: {_printable(problem)}")

    def _model_file(self) -> Path:
        file = self._file("Manifest.json")
        try:
            manifest = json.loads(file.read_bytes())
            path = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        except (ValueError, RecursionError) as error:
            raise self.invalid("Manifest.json is not JSON") from error
        except (KeyError, TypeError) as error:
            raise self.invalid("Manifest.json names no root model") from error
        if not isinstance(path, str):
            raise self.invalid("Manifest.json names no root model")
        return self._file(f"Data/{path}")

    def _file(self, relative: str) -> Path:
        """A regular file below the package, symbolic links resolved."""
        root = self.path.resolve()
        try:
            file = (root / relative).resolve()
            if not file.is_relative_to(root):
                raise self.invalid(f"'{relative}' leaves the package")
            if not file.is_file():
                raise self.invalid(f"'{relative}' is missing")
        except (OSError, ValueError) as error:
            raise self.invalid("a path in it is no path") from error
        return file

    def _main(self, model: Any) -> tuple[Any, Any]:
        if model.WhichOneof("Type") != "mlProgram":
            raise self.unsupported(f"holds a {model.WhichOneof('Type')}, not an mlProgram")
        name = model.description.defaultFunctionName or "main"
        functions = model.mlProgram.functions
        if name not in functions:
            raise self.invalid(f"the program has no function '{name}'")
        function = functions[name]
        if function.opset not in function.block_specializations:
            raise self.invalid(f"the program has no code for opset '{function.opset}'")
        return function, function.block_specializations[function.opset]

    def _operation(self, operation: Any) -> Operation:
        if not operation.outputs or operation.blocks:
            raise self.unsupported(f"operator '{operation.type}' is not known")
        arguments: dict[str, list[Argument]] = {
            name: [self._value(value)]
            for name, value in operation.attributes.items()
            if name != "name"
        }
        for name, argument in operation.inputs.items():
            arguments[name] = [
                Reference(binding.name)
                if binding.WhichOneof("binding") == "name"
                else self._value(binding.value)
                for binding in argument.arguments
            ]
        outputs = {output.name: _shape(output.type.tensorType) for output in operation.outputs}
        return Operation(operation.type, arguments, outputs)

    def _value(self, value: Any) -> Array | str:
        if value.type.WhichOneof("type") != "tensorType":
            raise self.unsupported(f"values of {value.type.WhichOneof('type')} are not known")
        tensor_type = value.type.tensorType
        shape = _shape(tensor_type)
        if shape is None:
            raise self.invalid("a value has no fixed shape")
        if value.WhichOneof("value") == "blobFileValue":
            blob = value.blobFileValue
            data_type = self._data_type(tensor_type.dataType)
            return self._blob(blob.fileName, blob.offset, data_type, shape)
        tensor = value.immediateValue.tensor
        if tensor_type.dataType == MIL_pb2.STRING:
            if shape or len(tensor.strings.values) != 1:
                raise self.unsupported("lists of strings are not known")
            return str(tensor.strings.values[0])
        return self._immediate(tensor, self._data_type(tensor_type.dataType), shape)

    def _data_type(self, number: int) -> _DataType:
        if number not in _DATA_TYPES:
            raise self.unsupported(f"data type {number} is not known")
        return _DATA_TYPES[number]

    def _immediate(self, tensor: Any, data_type: _DataType, shape: Shape) -> Array:
        if tensor.WhichOneof("value") not in (data_type.field, None):
            raise self.invalid(f"a value is not in the field '{data_type.field}'")
        values = getattr(tensor, data_type.field).values
        if data_type.field == "bytes":
            return self._unpacked(np.frombuffer(values, np.uint8), data_type, shape)
        if len(values) != math.prod(shape):
            raise self.invalid(f"a value of shape {list(shape)} has {len(values)} elements")
        try:
            return np.array(values, data_type.dtype).reshape(shape)
        except OverflowError as error:
            raise self.invalid(f"a value exceeds {data_type.dtype.__name__}") from error

    def _blob(self, name: str, offset: int, data_type: _DataType, shape: Shape) -> Array:
        """Read one record: a header at ``offset``, which says where the data is."""
        if not name.startswith(_MODEL_FOLDER):
            raise self.invalid(f"'{name}' is not below {_MODEL_FOLDER}")
        if name not in self._weights:
            relative = self._model_folder / name.removeprefix(_MODEL_FOLDER)
            self._weights[name] = np.fromfile(self._file(str(relative)), np.uint8)
        content = self._weights[name]
        where = f"{Path(name).name}: the record at {offset}"
        if offset + _RECORD.size > content.size:
            raise self.invalid(f"{where} lies beyond the end of the file ({content.size} bytes)")
        sentinel, blob_type, size, start, padding = _RECORD.unpack_from(content.data, offset)
        if sentinel != _SENTINEL:
            raise self.invalid(f"{where} does not begin with {_SENTINEL:#x}")
        if blob_type != data_type.blob or data_type.bits is None:
            raise self.invalid(f"{where} is of data type {blob_type}, not {data_type.blob}")
        if start + size > content.size:
            raise self.invalid(f"{where} ends beyond the end of the file ({content.size} bytes)")
        if data_type.bits < 8 and padding != 8 * size - data_type.bits * math.prod(shape):
            raise self.invalid(f"{where} has {padding} unused bits, which does not fit its shape")
        return self._unpacked(content[start : start + size], data_type, shape)

    def _unpacked(self, packed: npt.NDArray[np.uint8], data_type: _DataType, shape: Shape) -> Array:
        assert data_type.bits is not None
        count = math.prod(shape)
        expected = packed_size(count, data_type.bits)
        if packed.size != expected:
            raise self.invalid(
                f"a value of shape {list(shape)} needs {expected} bytes and has {packed.size}"
            )
        if data_type.bits < 8:
            return unpack(packed, data_type.bits, count).reshape(shape)
        return np.frombuffer(packed.tobytes(), data_type.dtype).reshape(shape)


def _shape(tensor_type: Any) -> Shape | None:
    """The shape of a tensor type, or None where a size is not fixed."""
    dimensions = tensor_type.dimensions
    if any(dimension.WhichOneof("dimension") != "constant" for dimension in dimensions):
        return None
    return tuple(int(dimension.constant.size) for dimension in dimensions)


def _printable(text: str) -> str:
    """One line for the terminal: names in a file may hold any characters."""
    return "".join(character if character.isprintable() else "?" for character in text)
