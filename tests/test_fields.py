from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from dkm_export.fields import fields, pack_fields, unpack_fields
from dkm_export.palette import pack, packed_size


@pytest.mark.parametrize("bits", range(1, 16))
def test_more_bits_than_a_byte_has(bits: int) -> None:
    numbers = np.random.default_rng(0).integers(0, 1 << bits, 27, dtype=np.uint16)
    packed = pack_fields(numbers, bits)
    assert packed.size == packed_size(27, bits)
    np.testing.assert_array_equal(unpack_fields(packed, bits, 27), numbers)


@pytest.mark.parametrize("bits", range(1, 9))
def test_fields_make_up_an_index(bits: int) -> None:
    parts = fields(bits)
    assert sum(field.width for field in parts) == bits
    assert all(field.shift % field.width == 0 for field in parts)
    assert sum(int(field.table().max()) for field in parts) == (1 << bits) - 1


@pytest.mark.parametrize(("bits", "count"), list(product(range(1, 9), (1, 7, 8, 27))))
def test_fields_fill_exactly_the_packed_bytes(bits: int, count: int) -> None:
    indices = np.random.default_rng(count).integers(0, 1 << bits, count, dtype=np.uint8)
    packed = pack_fields(indices, bits)
    assert packed.size == packed_size(count, bits)
    np.testing.assert_array_equal(unpack_fields(packed, bits, count), indices)
    if bits in (1, 2, 4, 8):
        np.testing.assert_array_equal(packed, pack(indices, bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_tables_take_the_packed_bytes_apart(bits: int) -> None:
    """With a multiple of 8 indices every field begins at a byte, as a graph would look it up."""
    indices = np.random.default_rng(0).integers(0, 1 << bits, 24, dtype=np.uint8)
    packed, found = pack_fields(indices, bits), np.zeros(24, np.uint8)
    for field in fields(bits):
        plane = packed[24 * field.shift // 8 : 24 * (field.shift + field.width) // 8]
        found += field.table()[plane].reshape(-1)
    np.testing.assert_array_equal(found, indices)


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_packed_one_by_one(bits: int) -> None:
    indices = np.random.default_rng(0).integers(0, 1 << bits, (3, 2, 8), dtype=np.uint8)
    packed = pack_fields(indices, bits)
    assert packed.shape == (3, 2, bits)
    np.testing.assert_array_equal(packed[2, 1], pack_fields(indices[2, 1], bits))
    np.testing.assert_array_equal(unpack_fields(packed, bits, 8), indices)
