"""Files of packed weights written and expanded in plain Python, from the format's definition.

`python runtime_tests/fuzz/weights_files.py` writes the fuzzer's corpus beside this file. The heads
here are no flatbuffers: to the native code they are bytes.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

from fuzz.lut_blobs import Blob, geometries, random_blob

HEADER = struct.Struct("<8sIIQQ")
ENTRY = struct.Struct("<64sQQQ")
CORPUS = Path(__file__).with_name("weights_corpus")


@dataclass(frozen=True)
class Weights:
    head: bytes
    blobs: Sequence[Blob]

    def expanded(self) -> bytes:
        ptd = self.head
        for blob in self.blobs:
            ptd += bytes(-len(ptd) % 64) + blob.dense().tobytes()
        return ptd

    def to_bytes(self) -> bytes:
        blobs = [blob.to_bytes() for blob in self.blobs]
        table, end = b"", len(self.head)
        for blob, packed in zip(self.blobs, blobs, strict=True):
            dense = blob.dense().tobytes()
            offset = end + -end % 64
            key = hashlib.sha256(dense).hexdigest().encode()
            table += ENTRY.pack(key, offset, len(dense), len(packed))
            end = offset + len(dense)
        header = HEADER.pack(b"DKM-PTD\0", 1, len(blobs), len(self.head), end)
        return b"".join((header, table, self.head, *blobs))


def examples() -> Iterator[tuple[str, Weights]]:
    """Files of a few small weights, by name."""
    yield "none", Weights(b"", ())
    yield "head", Weights(bytes(range(200)), ())
    for bits, dim in ((1, 1), (1, 64), (3, 2), (4, 4), (8, 1)):
        few = islice(geometries(dim, 1), 1, 4)
        blobs = tuple(random_blob(bits, dim, geometry) for _, geometry in few)
        for count in (1, len(blobs)):
            yield f"{bits}x{dim}-{count}", Weights(bytes(range(1, 100)), blobs[:count])


def hostile() -> Iterator[tuple[str, bytes]]:
    """Files that are refused, by what is wrong with them."""
    good = Weights(b"head", [random_blob(1, 1, g) for _, g in islice(geometries(1, 1), 2)])
    data = good.to_bytes()
    table, second = HEADER.size, HEADER.size + ENTRY.size

    def changed(offset: int, value: int, size: int = 8) -> bytes:
        return data[:offset] + value.to_bytes(size, "little") + data[offset + size :]

    yield "empty", b""
    yield "header", data[: HEADER.size]
    yield "truncated", data[:-1]
    yield "longer", data + b"\0"
    yield "magic", changed(0, 0)
    yield "version", changed(8, 2, 4)
    for name, value in {"zero": 0, "fewer": 1, "more": 3, "most": (1 << 32) - 1}.items():
        yield f"count-{name}", changed(12, value, 4)
    fields = {"head": 16, "ptd": 24}
    for name, entry in {"first": table, "second": second}.items():
        fields |= {f"{name}-{field}": entry + 64 + 8 * n for n, field in enumerate(_FIELDS)}
    for name, offset in fields.items():
        (old,) = struct.unpack_from("<Q", data, offset)
        for value in {0, old - 1, old + 1, old + 64, 1 << 40, (1 << 63) + old, (1 << 64) - 1}:
            yield f"{name}-{value - old:+}", changed(offset, value)
    # a head and a weight, or two weights, whose sizes are right once their sum has overflowed
    head = 1 << 40
    overflowing = ENTRY.pack(b"a" * 64, head, 4, (1 << 64) - head)
    yield "head-wrapped", HEADER.pack(b"DKM-PTD\0", 1, 1, head, head + 4) + overflowing
    wrapped = bytearray(data)
    for entry in (table, second):
        wrapped[entry + ENTRY.size - 1] ^= 0x80
    yield "blobs-wrapped", bytes(wrapped)
    yield "key", changed(table, ord("A"), 1)
    yield "blob", changed(len(data) - len(good.blobs[-1].to_bytes()), 0, 1)


_FIELDS = ("offset", "dense", "blob")


if __name__ == "__main__":
    for file in CORPUS.glob("*"):
        file.unlink()
    CORPUS.mkdir(exist_ok=True)
    for name, weights in examples():
        (CORPUS / name).write_bytes(weights.to_bytes())
