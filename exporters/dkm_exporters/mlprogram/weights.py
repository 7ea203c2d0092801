"""The weight files of an ML program: records of packed values, read without trust.

Format: coremltools 9.0, ``mlmodel/src/MILBlob``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from coremltools.proto import MIL_pb2

from dkm_export.errors import InvalidInput

Shape = tuple[int, ...]

_MODEL_FOLDER: Final = "@model_path/"
_SENTINEL: Final = 0xDEADBEEF
_RECORD: Final = struct.Struct("<IIQQQ")
"""Sentinel, data type, bytes, offset of the data, unused bits at the end; then reserved bytes."""
_RECORD_ALIGNMENT: Final = 64


@dataclass(frozen=True)
class DataType:
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


DATA_TYPES: Final = {
    MIL_pb2.BOOL: DataType(np.bool_, None, None, "bools"),
    MIL_pb2.FLOAT16: DataType(np.float16, 16, 1, "bytes"),
    MIL_pb2.FLOAT32: DataType(np.float32, 32, 2, "floats"),
    MIL_pb2.INT4: DataType(np.int8, 4, 8, "bytes"),
    MIL_pb2.INT8: DataType(np.int8, 8, 4, "bytes"),
    MIL_pb2.INT16: DataType(np.int16, 16, 6, "ints"),
    MIL_pb2.INT32: DataType(np.int32, 32, 14, "ints"),
    MIL_pb2.INT64: DataType(np.int64, None, None, "longInts"),
    MIL_pb2.UINT1: DataType(np.uint8, 1, 9, "bytes"),
    MIL_pb2.UINT2: DataType(np.uint8, 2, 10, "bytes"),
    MIL_pb2.UINT3: DataType(np.uint8, 3, 12, "bytes"),
    MIL_pb2.UINT4: DataType(np.uint8, 4, 11, "bytes"),
    MIL_pb2.UINT6: DataType(np.uint8, 6, 13, "bytes"),
    MIL_pb2.UINT8: DataType(np.uint8, 8, 3, "bytes"),
    MIL_pb2.UINT16: DataType(np.uint16, 16, 7, "ints"),
    MIL_pb2.UINT32: DataType(np.uint32, 32, 15, "bytes"),
}


class WeightFiles:
    """Those of which a program has taken something. No two records of a file share bytes.

    Args:
        find: the resolved file of a path in the model's folder; raises `InvalidInput`.
        invalid: makes an error that names the package.
    """

    def __init__(self, find: Callable[[str], Path], invalid: Callable[[str], InvalidInput]) -> None:
        self._find, self._invalid = find, invalid
        self._files: dict[str, Path] = {}
        self._contents: dict[Path, npt.NDArray[np.uint8]] = {}
        self._unread: dict[Path, int] = {}
        self._taken: set[tuple[Path, int]] = set()

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(content.size for content in self._contents.values())

    @property
    def unread_bytes(self) -> int:
        """Bytes of the records that nobody has taken."""
        return sum(
            min(
                sum(
                    size for offset, size in _records(content) if (file, offset) not in self._taken
                ),
                self._unread[file],
            )
            for file, content in self._contents.items()
        )

    def file(self, name: str) -> Path:
        """The file ``@model_path/...``, under whichever name; its content is mapped into memory.

        Raises:
            InvalidInput: when it is not in the package, or empty.
        """
        if not name.startswith(_MODEL_FOLDER):
            raise self._invalid(f"'{name}' is not below {_MODEL_FOLDER}")
        if name not in self._files:
            file = self._find(name.removeprefix(_MODEL_FOLDER))
            if file not in self._contents:
                try:
                    self._contents[file] = np.asarray(np.memmap(file, np.uint8, "r"))
                except (OSError, ValueError) as error:  # ValueError: nothing in it
                    raise self._invalid(f"'{file.name}' is empty or cannot be read") from error
                self._unread[file] = self._contents[file].size
            self._files[name] = file
        return self._files[name]

    def record(
        self, file: Path, offset: int, data_type: DataType, shape: Shape
    ) -> npt.NDArray[np.uint8]:
        """The packed values of a record.

        Args:
            file: as `file` gives it.
            offset: of the header, which says where the data is.
            data_type: of the values.
            shape: of the values.

        Raises:
            InvalidInput: when there is no such record, or it shares bytes with another one.
        """
        content = self._contents[file]
        where = f"{file.name}: the record at {offset}"
        if offset + _RECORD.size > content.size:
            raise self._invalid(f"{where} lies beyond the end of the file ({content.size} bytes)")
        sentinel, blob_type, size, start, padding = _RECORD.unpack_from(content.data, offset)
        if sentinel != _SENTINEL:
            raise self._invalid(f"{where} does not begin with {_SENTINEL:#x}")
        if blob_type != data_type.blob or data_type.bits is None:
            raise self._invalid(f"{where} is of data type {blob_type}, not {data_type.blob}")
        if start + size > content.size:
            raise self._invalid(f"{where} ends beyond the end of the file ({content.size} bytes)")
        if data_type.bits < 8 and padding != 8 * size - data_type.bits * math.prod(shape):
            raise self._invalid(f"{where} has {padding} unused bits, which does not fit its shape")
        self._unread[file] -= size
        if self._unread[file] < 0:
            raise self._invalid(f"{where} shares bytes with another one")
        self._taken.add((file, offset))
        return content[start : start + size]


def _records(content: npt.NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Offsets and bytes of the records of a weight file, up to the first that is none."""
    offset = _RECORD_ALIGNMENT  # after the header of the file
    while offset + _RECORD.size <= content.size:
        sentinel, _, size, start, _ = _RECORD.unpack_from(content.data, offset)
        if sentinel != _SENTINEL or start < offset or start + size > content.size:
            return
        yield offset, size
        offset = -(-max(start + size, offset + 1) // _RECORD_ALIGNMENT) * _RECORD_ALIGNMENT
