"""Packed weights in a file of their own, which an app expands once, when it is installed.

The stock runtime takes weights from a ``.ptd`` file. Ours holds blobs, see `blob`, and the
``.ptd`` up to its first weight, so that to expand it is to copy the head and to write each weight
at its place; `native/lut_weights.h` defines the format.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
from executorch.extension.flat_tensor.serialize.serialize import (
    FlatTensorConfig,
    FlatTensorHeader,
    FlatTensorSerializer,
)

from dkm_export.errors import InvalidInput
from dkm_export.files import staged
from dkm_exporters.executorch.blob import expand_blob, expanded_size

_MAGIC: Final = b"DKM-PTD\0"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sIIQQ")
_ENTRY: Final = struct.Struct("<64sQQQ")
_ALIGNMENT: Final = 64


@dataclass(frozen=True)
class WeightsFile:
    """What is in the file.

    Attributes:
        blobs: by the key of the weight.
        head: the ``.ptd`` up to its first weight.
        offsets: of each weight in the ``.ptd``, by key.
        size: of the ``.ptd`` in bytes.
    """

    blobs: Mapping[str, bytes]
    head: bytes
    offsets: Mapping[str, int]
    size: int

    @classmethod
    def of(cls, blobs: Mapping[str, bytes]) -> WeightsFile:
        """The file for these blobs.

        Raises:
            InvalidInput: when a blob is malformed.
        """
        sizes = {key: expanded_size(blob) for key, blob in blobs.items()}
        entries = {key: DataEntry(index, _ALIGNMENT, None) for index, key in enumerate(sizes)}
        # What the weights are does not matter to the head.
        payload = DataPayload([bytes(size) for size in sizes.values()], entries)
        config = FlatTensorConfig(segment_alignment=_ALIGNMENT)
        serialized = bytes(FlatTensorSerializer(config).serialize(payload))
        start = FlatTensorHeader.from_bytes(serialized[8:]).segment_base_offset
        offsets, end = {}, start
        for key, size in sizes.items():
            offsets[key] = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = offsets[key] + size
        return cls(blobs, serialized[:start], offsets, len(serialized))

    def to_bytes(self) -> bytes:
        """The content of the file."""
        entries = (
            _ENTRY.pack(key.encode(), self.offsets[key], expanded_size(blob), len(blob))
            for key, blob in self.blobs.items()
        )
        header = _HEADER.pack(_MAGIC, _VERSION, len(self.blobs), len(self.head), self.size)
        return b"".join((header, *entries, self.head, *self.blobs.values()))

    @classmethod
    def read(cls, path: Path) -> WeightsFile:
        """Read the file, and verify all of it: it is the only one with these blobs.

        Raises:
            InvalidInput: when it is missing or malformed.
        """
        if not path.is_file():
            raise InvalidInput(f"{path}: cannot be read: no such file, or no regular one")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
        try:
            blobs = _blobs(data)
            file = cls.of(blobs)
        except (InvalidInput, struct.error, ValueError) as error:
            raise InvalidInput(f"{path}: malformed: export it again") from error
        if file.to_bytes() != data:
            raise InvalidInput(f"{path}: contradicts itself: export it again")
        return file

    def expand(self, output: Path, *, force: bool = False) -> None:
        """Write the ``.ptd``, a weight at a time.

        Args:
            output: the file to make.
            force: replace an earlier one.

        Raises:
            InvalidInput: when ``output`` may not be replaced, or a blob is malformed.
        """
        with staged(output, force=force) as beside, beside.open("wb") as file:
            file.write(self.head)
            for key, blob in self.blobs.items():
                file.seek(self.offsets[key])
                file.write(expand_blob(blob).data)
            file.truncate(self.size)


def _blobs(data: bytes) -> dict[str, bytes]:
    _, _, count, head, _ = _HEADER.unpack_from(data)
    if count > len(data) // _ENTRY.size:
        raise ValueError("more weights than the file has room for")
    start = _HEADER.size + count * _ENTRY.size + head
    blobs = {}
    for index in range(count):
        key, _, _, size = _ENTRY.unpack_from(data, _HEADER.size + index * _ENTRY.size)
        blobs[key.decode("ascii")] = data[start : start + size]
        start += size
    return blobs
