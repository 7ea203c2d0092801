"""A ``.pte`` file taken apart: its instructions, and its constants as numpy arrays.

ExecuTorch's own reader restores constants by copying from each offset to the next one, so that a
doctored file can make it copy its segment any number of times. Here a constant is the bytes that
the runtime would read: from its offset on, as many as its shape takes, checked against the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from executorch.exir._serialize._flatbuffer_program import (
    _flatbuffer_to_program,
    _patch_generated_flatbuffer_aliases,
    _program_to_flatbuffer,
)
from executorch.exir._serialize._program import (
    _ExtendedHeader,
    _get_extended_header,
    _insert_flatbuffer_header,
)
from executorch.exir._serialize.generated.executorch_flatbuffer.Program import Program
from executorch.exir._serialize.padding import aligned_size, pad_to
from executorch.exir.scalar_type import ScalarType
from executorch.exir.schema import (
    BackendDelegateDataReference,
    BackendDelegateInlineData,
    DataLocation,
    String,
)

from dkm_export.errors import InvalidInput
from dkm_exporters.executorch.tables import Budget, fill, require_bounded

_MAGIC = b"ET"
_ALIGNMENT = 128
"""Of the segments in a file."""
_DTYPES: dict[Any, np.dtype[Any]] = {
    ScalarType.BOOL: np.dtype(np.bool_),
    ScalarType.BYTE: np.dtype(np.uint8),
    ScalarType.INT: np.dtype(np.int32),
    ScalarType.LONG: np.dtype(np.int64),
    ScalarType.HALF: np.dtype(np.float16),
    ScalarType.FLOAT: np.dtype(np.float32),
}


class ProgramFile:
    """The program in a file.

    Attributes:
        path: of the file.
        size: of the file in bytes.

    Raises:
        InvalidInput: when the file is missing, cut short or not a program.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
        self.size = len(data)
        header = _get_extended_header(data)
        if data[4:6] != _MAGIC or (header is None and _ExtendedHeader.EXPECTED_MAGIC in data[:16]):
            raise InvalidInput(f"{path}: not an ExecuTorch program, or cut short")
        if header is None:  # a program without segments
            header = _ExtendedHeader(self.size, self.size, 0)
        end = header.segment_base_offset + header.segment_data_size
        if not header.program_size <= header.segment_base_offset <= end <= self.size:
            raise InvalidInput(f"{path}: cut short, or its header is malformed: export it again")
        try:
            program = data[: header.program_size]
            _patch_generated_flatbuffer_aliases()  # or the generated classes do not find each other
            require_bounded(Program.GetRootAs(program), Budget.of(len(program)))
            self._program: Any = _flatbuffer_to_program(program)
            fill(self._program)
            self._data = memoryview(data)[header.segment_base_offset : end]
            self._segments = self._cut(self._data)
            self._constants = self._segments[self._program.constant_segment.segment_index]
            self._named = {
                entry.key: entry.segment_index for entry in self._program.named_data or ()
            }
            if any(index >= len(self._segments) for index in self._named.values()):
                raise ValueError("named data is in a segment that there is not")
        except Exception as error:  # generated code, without a check of its own
            raise InvalidInput(f"{path}: the program is malformed: export it again") from error

    def _cut(self, data: memoryview) -> list[memoryview]:
        segments = self._program.segments
        if any(segment.offset + segment.size > len(data) for segment in segments):
            raise ValueError("a segment ends after the file")
        if sum(segment.size for segment in segments) > len(data):
            raise ValueError("segments overlap")
        # a program without constants names a segment that there is not
        return [data[s.offset : s.offset + s.size] for s in segments] or [memoryview(b"")]

    def plan(self, method: str) -> Any:
        """The execution plan of a method.

        Raises:
            InvalidInput: when there is none.
        """
        for plan in self._program.execution_plan:
            if plan.name == method:
                return plan
        raise InvalidInput(
            f"{self.path}: has no method '{method}', so `dkm export` did not write it"
        )

    def strings(self, method: str) -> list[str]:
        """The strings that a constant method returns.

        Raises:
            InvalidInput: when there is no such method, or it returns something else.
        """
        plan = self.plan(method)
        try:
            values = [plan.values[index].val for index in plan.outputs]
        except IndexError:
            values = [None]
        if not all(isinstance(value, String) for value in values):
            raise InvalidInput(f"{self.path}: method '{method}' does not return strings")
        return [value.string_val for value in values]

    def constant(self, tensor: Any) -> npt.NDArray[Any] | None:
        """A tensor's data, read-only; None when it is no plain constant of the file.

        Raises:
            InvalidInput: when the data would lie outside of the file.
        """
        dtype = tensor_dtype(tensor)
        if tensor.data_buffer_idx == 0 or tensor.allocation_info is not None or dtype is None:
            return None
        count = math.prod(tensor.sizes)
        data = self.constant_bytes(tensor.data_buffer_idx, count * dtype.itemsize)
        return np.frombuffer(data, dtype, count).reshape(tensor.sizes)

    def constant_bytes(self, index: int, size: int) -> memoryview:
        """So many bytes of a constant.

        Raises:
            InvalidInput: when they would lie outside of the file.
        """
        offsets = self._program.constant_segment.offsets
        start = offsets[index] if index < len(offsets) else len(self._constants)
        if size < 0 or start + size > len(self._constants):
            raise InvalidInput(f"{self.path}: constant {index} is not within the file")
        found: memoryview = self._constants[start : start + size]
        return found

    @property
    def methods(self) -> list[str]:
        """Names of all methods."""
        return [plan.name for plan in self._program.execution_plan]

    @property
    def named_segments(self) -> Mapping[str, int]:
        """Numbers of the segments that the file has by name; several names may be of the same."""
        return self._named

    def segment_size(self, index: int) -> int:
        """Bytes of a segment."""
        return len(self._segments[index])

    @property
    def initial_bytes(self) -> int:
        """Bytes of the values that mutable buffers have at first.

        Raises:
            InvalidInput: when they are not in the file.
        """
        try:
            parts = self._program.mutable_data_segments or ()
            return sum(len(self._segments[part.segment_index]) for part in parts if part.offsets)
        except IndexError as error:
            raise InvalidInput(f"{self.path}: the values of buffers are not within it") from error

    def named(self, key: str) -> bytes | None:
        """Data that a delegate asks for by name, or None when the file does not have it."""
        segment = self._named.get(key)
        return None if segment is None else bytes(self._segments[segment])

    def backend(self, method: str, index: int) -> str:
        """The name of the backend that a delegate is for.

        Raises:
            InvalidInput: when the file does not have the delegate.
        """
        try:
            name: str = self.plan(method).delegates[index].id
        except IndexError as error:
            raise InvalidInput(f"{self.path}: delegate {index} is not within the file") from error
        return name

    def delegate_place(self, method: str, index: int) -> tuple[DataLocation, int]:
        """Where `delegate` is; delegates of several methods may be in the same place.

        Raises:
            InvalidInput: when the file does not have the delegate.
        """
        try:
            place = self.plan(method).delegates[index].processed
            return place.location, place.index
        except (IndexError, AttributeError) as error:
            raise InvalidInput(f"{self.path}: delegate {index} is not within the file") from error

    def delegate(self, method: str, index: int) -> bytes:
        """What a delegate of a method was given: a graph in a format of its own.

        Raises:
            InvalidInput: when the file does not have it.
        """
        location, number = self.delegate_place(method, index)
        try:
            if location == DataLocation.SEGMENT:
                return bytes(self._segments[number])
            return bytes(self._program.backend_delegate_data[number].data)
        except IndexError as error:
            raise InvalidInput(f"{self.path}: delegate {index} is not within the file") from error

    def set_delegate(self, method: str, index: int, processed: bytes) -> None:
        """Give a delegate another graph, for `to_bytes`."""
        graphs = self._program.backend_delegate_data
        place = BackendDelegateDataReference(DataLocation.INLINE, len(graphs))
        self.plan(method).delegates[index].processed = place
        graphs.append(BackendDelegateInlineData(processed))

    def to_bytes(self) -> bytes:
        """A file with the plans as they are now, changed or not, and the segments as they were."""
        program = _program_to_flatbuffer(self._program)
        room = aligned_size(_ExtendedHeader.EXPECTED_LENGTH, program.max_alignment)
        size = room + len(program.data)
        start = aligned_size(size, _ALIGNMENT)
        header = pad_to(_ExtendedHeader(size, start, len(self._data)).to_bytes(), room)
        head = _insert_flatbuffer_header(program.data, _MAGIC.decode(), header)
        content: bytes = pad_to(head, start) + bytes(self._data)
        return content


def buffer_name(tensor: Any) -> str:
    """The name of the mutable buffer that a tensor of a plan is, or an empty string."""
    extra = tensor.extra_tensor_info
    return "" if extra is None else extra.fully_qualified_name or ""


def tensor_dtype(tensor: Any) -> np.dtype[Any] | None:
    """The dtype of a plain contiguous tensor, or None where it is another or of another layout."""
    if tensor.storage_offset or list(tensor.dim_order) != list(range(len(tensor.sizes))):
        return None
    return _DTYPES.get(tensor.scalar_type)
