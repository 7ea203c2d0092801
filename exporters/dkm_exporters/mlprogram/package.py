"""Read a saved ``.mlpackage`` as data: its files, its program and the values in ``weight.bin``.

Nothing here runs Core ML or trusts the package: no path leaves its folder, and every offset and
size is checked against the bytes that are there. Values take at most eight times the memory of the
files: no two records of a file may share bytes, and one bit becomes at most one byte. What
`palettes` makes of them has a limit of its own. Formats: ``Manifest.json``, ``Model.proto`` and
``MIL.proto`` of coremltools 9.0.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
from coremltools.proto import MIL_pb2, Model_pb2
from google.protobuf.message import DecodeError

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.palette import packed_size, unpack
from dkm_export.text import printable
from dkm_exporters.mlprogram.weights import DATA_TYPES, DataType, Shape, WeightFiles

Array = npt.NDArray[Any]

_LARGEST_MODEL: Final = 1 << 31
"""Bytes of a model file; protobuf reads no more."""

_MOST_AXES: Final = 32
_MOST_ELEMENTS: Final = 1 << 48
"""Of one value, sizes of 0 counted as 1; beyond, numpy's own arithmetic overflows."""


@dataclass(frozen=True)
class TensorType:
    """What the program says about a tensor.

    Attributes:
        float16: whether its values are.
        shape: its sizes, None where one is flexible; None where not even the rank is known.
    """

    float16: bool
    shape: tuple[int | None, ...] | None

    def fits(self, shape: Shape) -> bool:
        """Whether a tensor of ``shape`` is what the program says."""
        return self.shape is None or (
            len(self.shape) == len(shape)
            and all(size in (None, given) for size, given in zip(self.shape, shape, strict=True))
        )

    def __str__(self) -> str:
        sizes = ("?" if size is None else str(size) for size in self.shape or ())
        return f"[{', '.join(sizes)}]"


@dataclass(frozen=True)
class Reference:
    """An argument that is the output of an earlier operation or an input of the program."""

    name: str


Constant = Array | str | tuple[str | float, ...]
"""A tuple is what the program calls a list, such as the labels of a classifier."""

Argument = Reference | Constant


@dataclass(frozen=True)
class Storage:
    """How a tensor is stored.

    Attributes:
        word: the type of its values, such as ``uint4``.
        bits: of one of them.
        shape: its sizes.
        nbytes: that it takes.
        place: file and offset; None where it is in the model file itself.
    """

    word: str
    bits: int
    shape: Shape
    nbytes: int
    place: tuple[str, int] | None


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of the program. Blocks inside it are not read.

    Attributes:
        kind: operator, such as ``conv``.
        arguments: inputs and attributes by parameter name; several for a variadic parameter.
        outputs: their types by name.
        place: where it is, such as ``operation 12 of 40 in function 'main'``.
        storage: of the arguments that are tensors, by parameter name.
        nested: bytes of the blocks inside it.
    """

    kind: str
    arguments: dict[str, list[Argument]]
    outputs: dict[str, TensorType]
    place: str
    storage: dict[str, Storage]
    nested: int

    @property
    def name(self) -> str:
        """Name of the first output, which is unique in the program."""
        return next(iter(self.outputs), self.kind)

    @property
    def references(self) -> set[str]:
        """The names that its arguments refer to."""
        given = (argument for values in self.arguments.values() for argument in values)
        return {argument.name for argument in given if isinstance(argument, Reference)}


class Package:
    """A function of an ML program, the main one at first.

    Args:
        path: the ``.mlpackage``.
        label: what errors call it, where that is not its path.

    Attributes:
        path: as given.
        metadata: the model's user-defined metadata.
        functions: names of all functions.
        function: name of this one.
        inputs: types by name, in order; states are not among them.
        outputs: names in order, less a classifier's label and probabilities where it has others.
        float16: whether any operation gives float16.
        operations: in order of execution.

    Raises:
        InvalidInput: when the package is malformed.
        Unsupported: when it holds something other than an ML program, or unknown data types.
    """

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path = path
        self._label = label or str(path)
        model_file = self._model_file()
        folder = model_file.parent.relative_to(path.resolve())
        self._weights = WeightFiles(lambda name: self._file(str(folder / name)), self.invalid)
        self._values: dict[tuple[Path, int, int, Shape], Array] = {}
        self._nested: set[str] = set()
        model = Model_pb2.Model()
        content = self._content(model_file)
        self._model_bytes = len(content)
        try:
            model.ParseFromString(content)
        except DecodeError as error:
            raise self.invalid(f"{model_file.name} is not a Core ML model") from error
        if model.WhichOneof("Type") != "mlProgram":
            raise self.unsupported(f"holds a {model.WhichOneof('Type')}, not an mlProgram")
        self._model = model
        self.metadata = dict(model.description.metadata.userDefined)
        self.functions = list(model.mlProgram.functions)
        self._read(model.description.defaultFunctionName or "main")

    @property
    def nbytes(self) -> int:
        """Bytes of the model file, and of the weight files of which it has taken something."""
        return self._model_bytes + self._weights.nbytes

    @property
    def unread_bytes(self) -> int:
        """Bytes of the records of weight files that no operation of a function so far has taken.

        Raises:
            InvalidInput: when there is not the file that an operation in a block takes one of.
        """
        for name in self._nested:
            self._weights.file(name)
        return self._weights.unread_bytes

    def another(self, function: str) -> Self:
        """The same program's function of this name, which is one of `functions`.

        Raises:
            InvalidInput, Unsupported: as the package does.
        """
        package = copy.copy(self)
        package._read(function)
        return package

    def _read(self, name: str) -> None:
        model = self._model
        function, block = self._code(name)
        self.function = name
        self.inputs = {
            entry.name: _tensor_type(entry.type)
            for entry in function.inputs
            if entry.type.WhichOneof("type") != "stateType"
        }
        description = model.description
        labels = {description.predictedFeatureName, description.predictedProbabilitiesName}
        self.outputs = [name for name in block.outputs if name not in labels] or [*block.outputs]
        outputs = [output for operation in block.operations for output in operation.outputs]
        names = {*(entry.name for entry in function.inputs), *(output.name for output in outputs)}
        if len(names) < len(function.inputs) + len(outputs):
            raise self.invalid("the program defines a name twice")
        self.float16 = any(_tensor_type(output.type).float16 for output in outputs)
        self.operations = [
            self._operation(
                operation, f"operation {number} of {len(block.operations)} in function '{name}'"
            )
            for number, operation in enumerate(block.operations, start=1)
        ]

    def invalid(self, problem: str) -> InvalidInput:
        """An error that names the package, to be raised."""
        return InvalidInput(f"{self._label}: {printable(problem)}: export it again")

    def unsupported(self, problem: str) -> Unsupported:
        """An error that names the package, to be raised."""
        return Unsupported(f"{self._label}: {printable(problem)}")

    def _model_file(self) -> Path:
        content = self._content(self._file("Manifest.json"))
        try:
            manifest = json.loads(content)
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
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise self.invalid("a path in it is no path") from error
        return file

    def _content(self, file: Path) -> bytes:
        try:
            if file.stat().st_size >= _LARGEST_MODEL:
                raise self.invalid(f"'{file.name}' is larger than 2 GiB")
            return file.read_bytes()
        except OSError as error:
            raise self.invalid(f"'{file.name}' cannot be read: {error.strerror}") from error

    def _code(self, name: str) -> tuple[Any, Any]:
        functions = self._model.mlProgram.functions
        if name not in functions:
            raise self.invalid(f"the program has no function '{name}'")
        function = functions[name]
        if function.opset not in function.block_specializations:
            raise self.invalid(f"the program has no code for opset '{function.opset}'")
        return function, function.block_specializations[function.opset]

    def _operation(self, operation: Any, place: str) -> Operation:
        values = {key: value for key, value in operation.attributes.items() if key != "name"}
        arguments: dict[str, list[Argument]] = {
            name: [self._value(value)] for name, value in values.items()
        }
        for name, argument in operation.inputs.items():
            values.pop(name, None)  # an attribute of the same name
            arguments[name] = [
                Reference(binding.name)
                if binding.WhichOneof("binding") == "name"
                else self._value(binding.value)
                for binding in argument.arguments
            ]
            if len(argument.arguments) == 1 and argument.arguments[0].HasField("value"):
                values[name] = argument.arguments[0].value
        outputs = {output.name: _tensor_type(output.type) for output in operation.outputs}
        if any(len(output.shape or ()) > _MOST_AXES for output in outputs.values()):
            raise self.invalid(f"{place} gives a value with too many axes")
        storage = {
            name: self._storage(value)
            for name, value in values.items()
            if isinstance(arguments[name][0], np.ndarray)
        }
        nested = sum(block.ByteSize() for block in operation.blocks)
        self._nested.update(name for block in operation.blocks for name in _weight_files(block))
        return Operation(operation.type, arguments, outputs, place, storage, nested)

    def _storage(self, value: Any) -> Storage:
        """How a tensor is stored that `_value` has read."""
        tensor_type = value.type.tensorType
        data_type, shape = self._data_type(tensor_type.dataType), self._fixed_shape(tensor_type)
        bits = data_type.bits or 8 * np.dtype(data_type.dtype).itemsize
        word = MIL_pb2.DataType.Name(tensor_type.dataType).lower()
        nbytes = packed_size(math.prod(shape), bits)
        if value.WhichOneof("value") != "blobFileValue":
            # protobuf stores small integers in few bytes
            nbytes = min(nbytes, value.immediateValue.ByteSize())
            return Storage(word, bits, shape, nbytes, None)
        blob = value.blobFileValue
        place = (str(self._weights.file(blob.fileName)), blob.offset)
        return Storage(word, bits, shape, nbytes, place)

    def _value(self, value: Any) -> Constant:
        if value.type.WhichOneof("type") == "listType":
            return self._list(value.immediateValue.list.values)
        if value.type.WhichOneof("type") != "tensorType":
            raise self.unsupported(f"values of {value.type.WhichOneof('type')} are not known")
        tensor_type = value.type.tensorType
        shape = self._fixed_shape(tensor_type)
        if value.WhichOneof("value") == "blobFileValue":
            blob = value.blobFileValue
            data_type = self._data_type(tensor_type.dataType)
            return self._blob(blob.fileName, blob.offset, data_type, shape)
        tensor = value.immediateValue.tensor
        if tensor_type.dataType == MIL_pb2.STRING:
            if shape or len(tensor.strings.values) != 1:
                raise self.unsupported("tensors of strings are not known")
            return str(tensor.strings.values[0])
        return self._immediate(tensor, self._data_type(tensor_type.dataType), shape)

    def _list(self, values: Any) -> tuple[str | float, ...]:
        return tuple(self._element(self._value(value)) for value in values)

    def _element(self, value: Constant) -> str | float:
        match value:
            case str():
                return value
            case np.ndarray(shape=()):
                number: float = value.item()
                return number
        raise self.unsupported("lists of other things than strings and numbers are not known")

    def _fixed_shape(self, tensor_type: Any) -> Shape:
        shape = tuple(_size(dimension) for dimension in tensor_type.dimensions)
        sizes = [size for size in shape if size is not None]
        if len(sizes) < len(shape):
            raise self.invalid("a value has no fixed shape")
        if len(sizes) > _MOST_AXES or math.prod(max(size, 1) for size in sizes) > _MOST_ELEMENTS:
            raise self.invalid("a value has too many axes or elements")
        return tuple(sizes)

    def _data_type(self, number: int) -> DataType:
        if number not in DATA_TYPES:
            raise self.unsupported(f"data type {number} is not known")
        return DATA_TYPES[number]

    def _immediate(self, tensor: Any, data_type: DataType, shape: Shape) -> Array:
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

    def _blob(self, name: str, offset: int, data_type: DataType, shape: Shape) -> Array:
        """Read one record: a header at ``offset``, which says where the data is."""
        file = self._weights.file(name)
        key = (file, offset, data_type.blob or 0, shape)
        if key not in self._values:
            packed = self._weights.record(file, offset, data_type, shape)
            self._values[key] = self._unpacked(packed, data_type, shape)
        return self._values[key]

    def _unpacked(self, packed: npt.NDArray[np.uint8], data_type: DataType, shape: Shape) -> Array:
        assert data_type.bits is not None
        count = math.prod(shape)
        expected = packed_size(count, data_type.bits)
        if packed.size != expected:
            raise self.invalid(
                f"a value of shape {list(shape)} needs {expected} bytes and has {packed.size}"
            )
        if data_type.bits >= 8:
            return packed.view(data_type.dtype).reshape(shape)
        values = unpack(packed, data_type.bits, count).reshape(shape)
        if data_type.dtype is np.int8:
            sign = 1 << (data_type.bits - 1)
            return (values ^ sign).astype(np.int8) - np.int8(sign)
        return values


def _weight_files(block: Any) -> Iterator[str]:
    """Those that the values in a block are in; protobuf reads no deeper nesting than 100."""
    for operation in block.operations:
        bound = (x.value for given in operation.inputs.values() for x in given.arguments)
        for value in (*operation.attributes.values(), *bound):
            if value.WhichOneof("value") == "blobFileValue":
                yield value.blobFileValue.fileName
        for inner in operation.blocks:
            yield from _weight_files(inner)


def _tensor_type(value_type: Any) -> TensorType:
    """What is said about a tensor; nothing where the value is none, such as a dictionary."""
    tensor = value_type.tensorType
    if value_type.WhichOneof("type") != "tensorType" or any(
        dimension.unknown.variadic for dimension in tensor.dimensions
    ):
        return TensorType(tensor.dataType == MIL_pb2.FLOAT16, None)
    shape = tuple(_size(dimension) for dimension in tensor.dimensions)
    return TensorType(tensor.dataType == MIL_pb2.FLOAT16, shape)


def _size(dimension: Any) -> int | None:
    """A size, or None where it is not fixed."""
    if dimension.WhichOneof("dimension") != "constant":
        return None
    return int(dimension.constant.size)
