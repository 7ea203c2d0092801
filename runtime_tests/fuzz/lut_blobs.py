"""LUT blobs written and expanded in plain numpy, straight from the format's definition.

`python runtime_tests/fuzz/lut_blobs.py` writes the fuzzer's corpus beside this file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HEADER = struct.Struct("<8sIBBHQQQQQQQQ")
FIELDS = {"magic": 0, "version": 8, "bits": 12, "dim": 13, "element": 14, "outer": 16, "size": 24}
FIELDS |= {"inner": 32, "groups": 40, "group_stride": 48, "scales": 56, "scale_stride": 64}
"""Offsets in the header."""

FLOAT32, FLOAT16, ROUNDED = ELEMENTS = range(3)
"""What a weight consists of; ROUNDED is float32 that float16 can hold."""

CORPUS = Path(__file__).with_name("corpus")


@dataclass(frozen=True)
class Geometry:
    """The order of a weight [outer, size, inner], and where its LUTs and scales take turns."""

    outer: int
    size: int
    inner: int
    groups: int = 1
    group_stride: int = 1
    scales: int = 0
    scale_stride: int = 1

    @property
    def elements(self) -> int:
        return self.outer * self.size * self.inner


@dataclass(frozen=True)
class Blob:
    bits: int
    dim: int
    geometry: Geometry
    lut: npt.NDArray[np.float16]
    """[groups, 2**bits, dim]"""
    scale: npt.NDArray[np.float32]
    indices: npt.NDArray[np.uint8]
    """[outer, ceil(size / dim), inner]"""
    element: int = FLOAT32

    def header(self) -> bytes:
        g = self.geometry
        extents = (g.outer, g.size, g.inner, g.groups, g.group_stride, g.scales, g.scale_stride)
        return HEADER.pack(b"DKM-LUT\0", 1, self.bits, self.dim, self.element, *extents, 0)

    def to_bytes(self) -> bytes:
        bits = np.unpackbits(self.indices.reshape(-1, 1), axis=1, bitorder="little")
        packed = np.packbits(bits[:, : self.bits].reshape(-1), bitorder="little")
        return b"".join([self.header(), *(a.tobytes() for a in (self.lut, self.scale, packed))])

    def dense(self) -> npt.NDArray[Any]:
        g = self.geometry
        e = np.arange(g.elements)
        row, d = np.divmod(e // g.inner % g.size, self.dim)
        index = self.indices[e // (g.size * g.inner), row, e % g.inner]
        dense = self.lut[e // g.group_stride % g.groups, index, d].astype(np.float32)
        if g.scales:
            dense *= self.scale[e // g.scale_stride % g.scales]
        if self.element == FLOAT32:
            return dense
        with np.errstate(over="ignore"):
            halves = dense.astype(np.float16)
        return halves if self.element == FLOAT16 else halves.astype(np.float32)


def random_blob(
    bits: int, dim: int, geometry: Geometry, seed: int = 0, element: int = FLOAT32
) -> Blob:
    generator = np.random.default_rng(seed)
    lut = generator.normal(0, 1, (geometry.groups, 1 << bits, dim)).astype(np.float16)
    lut[:, 0, 0] = np.float16(6e-8)  # the smallest subnormal
    lut[:, -1, -1] = np.float16(-0.0)
    shape = (geometry.outer, -(-geometry.size // dim), geometry.inner)
    indices = generator.integers(0, 1 << bits, shape, dtype=np.uint8)
    scale = generator.normal(1, 1, geometry.scales).astype(np.float32)
    return Blob(bits, dim, geometry, lut, scale, indices, element)


def geometries(dim: int, rows: int) -> Iterator[tuple[str, Geometry]]:
    """The orders in which weights occur, in XNNPACK's memory, with `rows` vectors of outputs.

    Convolutions [O, I, H, W] are [O, H, W, I] there, depthwise ones [1, H, W, C].
    """
    o, i, h, w = rows * dim, 2 * dim, 2, 1
    hwi = h * w * i
    weights = {
        "linear": Geometry(1, o, i, scales=o, scale_stride=i),
        "along_outputs": Geometry(1, o, hwi, scales=o, scale_stride=hwi),
        "along_outputs_odd": Geometry(1, o, 7, scales=o, scale_stride=7),
        "along_inputs": Geometry(o * h * w, i, 1, scales=o, scale_stride=hwi),
        "depthwise": Geometry(h * w, o, 1, scales=o),
        "transposed": Geometry(5 * h * w, o, 1, scales=5, scale_stride=h * w * o),
        "one_scale": Geometry(1, o, 4, scales=1, scale_stride=4 * o),
    }
    yield from weights.items()
    for groups in {rows, 2 if rows % 2 == 0 else 1} - {1}:
        own = {
            "linear": o * i // groups,
            "along_outputs": o * hwi // groups,
            "along_outputs_odd": o * 7 // groups,
            "along_inputs": o * hwi // groups,
            "depthwise": o // groups,
            "transposed": o // groups,
        }
        for name, stride in own.items():
            yield (
                f"{name}_groups{groups}",
                replace(weights[name], groups=groups, group_stride=stride),
            )
    if dim > 1:
        # the last vector of each run along `size` is cut
        yield "padded", Geometry(1, o - 1, hwi, scales=o - 1, scale_stride=hwi)
        yield "padded_even", Geometry(1, o + 1, 8, scales=o + 1, scale_stride=8)
        yield "padded_inside", Geometry(2 * o, i + 1, 1, 2, o * (i + 1), o, 2 * (i + 1))
        yield "padded_depthwise", Geometry(h * w, o - 1, 1, scales=o - 1)
        # each LUT takes its turn within a row
        yield "group_columns", Geometry(2, o, 12, groups=3, group_stride=2, scales=2)
    else:
        yield "uneven", Geometry(1, 2 * o + 1, 1)


def corpus() -> Iterator[tuple[str, bytes]]:
    """Small blobs of every kind, and hostile ones."""
    for bits in range(1, 9):
        dim = (1, 2, 3, 4, 5, 8, 16, 64)[bits - 1]
        for turn, (name, geometry) in enumerate(geometries(dim, 2)):
            # eight blobs together have all geometries, each several times
            if turn % 4 != bits % 4:
                continue
            if turn % 3 == 0:
                geometry = replace(geometry, scales=0, scale_stride=1)
            content = random_blob(bits, dim, geometry, element=turn % 3).to_bytes()
            if len(content) < 9000:
                yield f"{bits}x{dim}-{name}", content
    blob = random_blob(3, 2, Geometry(2, 5, 3, 2, 15, 5, 3))
    good = blob.to_bytes()
    yield "hostile-empty", b""
    yield "hostile-header", good[:79]
    yield "hostile-truncated", good[:-1]
    yield "hostile-longer", good + b"\0"
    for name, offset in FIELDS.items():
        length = 1 if name in ("bits", "dim") else 8 if offset >= 16 else 2
        for value in (b"\0", b"\xff"):
            hostile = good[:offset] + value * length + good[offset + length :]
            if hostile != good:
                yield f"hostile-{name}-{value.hex()}", hostile
    for extents in ((1 << 32, 1 << 32, 1), (1 << 62, 2, 2), (1, (1 << 63) + 1, 2)):
        header = replace(blob, geometry=Geometry(*extents)).header()
        yield f"hostile-{prod(extents).bit_length()}-bits", header + good[80:]


if __name__ == "__main__":
    for file in CORPUS.glob("*"):
        file.unlink()
    CORPUS.mkdir(exist_ok=True)
    for file_name, content in corpus():
        (CORPUS / file_name).write_bytes(content)
