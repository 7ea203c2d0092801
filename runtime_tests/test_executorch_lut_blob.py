"""LUT blobs of ExecuTorch programs: the native decoder against plain numpy, and hostile blobs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from dkm_exporters.executorch.native import compile_target
from fuzz.lut_blobs import (
    CORPUS,
    ELEMENTS,
    FIELDS,
    FLOAT16,
    Blob,
    Geometry,
    corpus,
    geometries,
    random_blob,
)
from tests.compiler import needs_compiler

pytestmark = needs_compiler
DIMS = (1, 2, 3, 4, 5, 8, 16, 64)


class Decoder:
    """The C functions of a library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.dkm_lut_error.restype = ctypes.c_char_p

    def error(self, code: int) -> str:
        text: bytes = self._library.dkm_lut_error(code)
        return text.decode()

    def expand(self, blob: bytes, size: int | None = None, shift: int = 0) -> Expanded:
        """The weight of a blob, or what is wrong with it."""
        # at the very end of a malloc, so that a sanitizer or a guard page would see more
        data = ctypes.create_string_buffer(blob, len(blob)) if blob else None
        length = ctypes.c_size_t(len(blob))
        found = ctypes.c_size_t(0)
        code = self._library.dkm_lut_expanded_size(data, length, ctypes.byref(found))
        if code:
            assert self._library.dkm_lut_expand(data, length, None, ctypes.c_size_t(0)) == code
            return self.error(code)
        size = found.value if size is None else size
        around = b"\xa5" * 8
        dense = np.frombuffer(around + bytes(found.value) + around, np.uint8).copy()
        out = ctypes.c_void_p(dense.ctypes.data + 8 + shift)
        code = self._library.dkm_lut_expand(data, length, out, ctypes.c_size_t(size))
        assert dense[:8].tobytes() == dense[-8:].tobytes() == around
        return self.error(code) if code else dense[8:-8].tobytes()


Expanded = bytes | str


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    build = tmp_path_factory.mktemp("lut")
    compile_target("dkm_lut_shared", build, ["-DDKM_ONLY_FORMAT=ON"])
    (library,) = build.glob("libdkm_lut_shared.*")
    return Decoder(library)


def check(decoder: Decoder, blob: Blob, name: str) -> None:
    found = decoder.expand(blob.to_bytes())
    assert not isinstance(found, str), (name, found)
    expected = blob.dense()
    bits = np.uint16 if blob.element == FLOAT16 else np.uint32
    np.testing.assert_array_equal(np.frombuffer(found, bits), expected.view(bits), name)


@pytest.mark.parametrize("bits", range(1, 9))
def test_expands_every_geometry_bit_for_bit(bits: int, decoder: Decoder) -> None:
    for dim, rows in product(DIMS, (1, 4)):
        for seed, (name, geometry) in enumerate(geometries(dim, rows)):
            for element, scaled in product(ELEMENTS, (False, True)):
                if not scaled:
                    geometry = replace(geometry, scales=0, scale_stride=1)
                blob = random_blob(bits, dim, geometry, seed, element)
                check(decoder, blob, f"{name} dim {dim} element {element}")


@pytest.mark.parametrize("bits", range(1, 9))
def test_expands_what_does_not_fit_into_the_cache(bits: int, decoder: Decoder) -> None:
    """Several chunks, and enough weights for LUTs of several indices."""
    for dim in DIMS:
        size = 2 * dim
        many = 20_000 // size + 1
        wide = many // 8 * 8 + 8
        for seed, geometry in enumerate(
            (
                Geometry(1, size, wide, scales=size, scale_stride=wide),
                Geometry(1, size, many | 1),
                Geometry(1, size, wide, groups=2, group_stride=dim * wide),
                Geometry(1, size, 2 * wide, groups=2, group_stride=wide),
                Geometry(many, size, 1, scales=size),
                Geometry(many, size + 1, 1),
                Geometry(3, size + 1, wide),
            )
        ):
            for element in ELEMENTS:
                blob = random_blob(bits, dim, geometry, seed, element)
                check(decoder, blob, f"{geometry} dim {dim} element {element}")


def test_halves_become_the_same_floats(decoder: Decoder) -> None:
    """All of them, infinities and NaN included."""
    lut = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(4, 256, 64)
    indices = np.tile(np.arange(256, dtype=np.uint8), 4).reshape(4, 1, 256)
    geometry = Geometry(4, 64, 256, groups=4, group_stride=64 * 256)
    for element in ELEMENTS:
        blob = Blob(8, 64, geometry, lut, np.zeros(0, np.float32), indices, element)
        check(decoder, blob, "halves")


def test_products_are_rounded_as_numpy_rounds_them(decoder: Decoder) -> None:
    """Every float16 times factors that reach subnormal ones, ties and infinity."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    lut = np.where(np.isfinite(halves), halves, np.float16(1)).reshape(4, 256, 64)
    indices = np.tile(np.arange(256, dtype=np.uint8), 4).reshape(4, 1, 256)
    factors = [2.0**-15, -(2.0**-24), 1 + 2.0**-11, 1 + 3 * 2.0**-12, 0.1, -3.7, 2.0**20, 0.0]
    scale = np.array(factors, np.float32)
    geometry = Geometry(4, 64, 256, 4, 64 * 256, len(scale), 4 * 64 * 256 // len(scale))
    for turn, element in product(range(len(scale)), ELEMENTS):
        blob = Blob(8, 64, geometry, lut, np.roll(scale, turn), indices, element)
        check(decoder, blob, f"turn {turn} element {element}")


@pytest.mark.parametrize("dim", [1, 2])
def test_no_truncated_blob_is_read(dim: int, decoder: Decoder) -> None:
    geometry = Geometry(2, 5 if dim > 1 else 6, 3, 2, 3 * (5 if dim > 1 else 6), 2, 3)
    blob = random_blob(3, dim, geometry).to_bytes()
    assert not isinstance(decoder.expand(blob), str)
    for length in range(80):
        assert decoder.expand(blob[:length]) == "the buffer is shorter than the header"
    for length in range(80, len(blob)):
        assert decoder.expand(blob[:length]) == "the size of the buffer is not what its header says"
    assert decoder.expand(blob + b"\0") == "the size of the buffer is not what its header says"


def test_any_byte_of_a_header_may_be_wrong(decoder: Decoder) -> None:
    blob = random_blob(3, 2, Geometry(2, 5, 3, 2, 15, 5, 3)).to_bytes()
    for offset, value in product(range(80), range(256)):
        hostile = blob[:offset] + bytes([value]) + blob[offset + 1 :]
        if isinstance(decoder.expand(hostile), str):
            continue
        # What still is a blob differs at most in where LUTs and scales take turns.
        assert hostile == blob or offset >= FIELDS["group_stride"] or offset in (13, 14, 24)


Change = Callable[[Geometry], Geometry]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: replace(g, outer=0), "an extent, a stride or the number of groups is 0"),
        (lambda g: replace(g, groups=0), "an extent, a stride or the number of groups is 0"),
        (lambda g: replace(g, scale_stride=0), "an extent, a stride or the number of groups is 0"),
        (lambda g: replace(g, outer=1 << 40), "the dense weight is too large"),
        (lambda g: replace(g, size=1 << 62, inner=8), "the dense weight is too large"),
        (lambda g: replace(g, groups=7), "the groups do not divide the weight evenly"),
        (lambda g: replace(g, groups=2, group_stride=1 << 63), "the groups do not divide"),
        (lambda g: replace(g, groups=2, group_stride=6), "a vector is in more than one group"),
        (lambda g: replace(g, groups=4, group_stride=3), "a vector is in more than one group"),
        (lambda g: replace(g, scales=5), "the scales do not divide the weight evenly"),
        (lambda g: replace(g, scales=1 << 63, scale_stride=2), "the scales do not divide"),
        (lambda g: replace(g, scales=2), "the size of the buffer is not what its header says"),
    ],
)
def test_what_makes_no_sense_is_said(change: Change, message: str, decoder: Decoder) -> None:
    geometry = Geometry(2, 8, 6)
    blob = random_blob(4, 4, geometry)
    hostile = replace(blob, geometry=change(geometry)).header() + blob.to_bytes()[80:]
    found = decoder.expand(hostile)
    assert isinstance(found, str)
    assert found.startswith(message)


def test_refuses_an_output_that_does_not_fit(decoder: Decoder) -> None:
    blob = random_blob(4, 1, Geometry(1, 10, 1)).to_bytes()
    for size in (0, 36, 39, 44):
        assert decoder.expand(blob, size) == "the output has not the size of the dense weight"
    assert decoder.expand(blob, shift=1) == "the output is not aligned to 4 bytes"


def test_every_error_has_a_text(decoder: Decoder) -> None:
    texts = [decoder.error(code) for code in range(17)]
    assert len(set(texts)) == len(texts)
    assert decoder.error(17) == decoder.error(-1) == "unknown error"


def test_the_fuzzers_corpus(decoder: Decoder) -> None:
    """It is what its script writes, and no file of it is a surprise."""
    files = {file.name: file.read_bytes() for file in CORPUS.iterdir()}
    assert files == dict(corpus())
    for name, content in files.items():
        assert isinstance(decoder.expand(content), str) == name.startswith("hostile"), name
