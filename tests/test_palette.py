from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dkm_export.errors import InvalidInput
from dkm_export.palette import Layout, Palette, pack, packed_size, to_int8_grid, unpack

bits = st.integers(1, 8)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    axis = draw(st.integers(0, len(shape) - 1))
    dim = draw(st.integers(1, 9))
    groups = draw(st.sampled_from([g for g in range(1, shape[0] + 1) if shape[0] % g == 0]))
    if axis == 0 and shape[0] // groups % dim:
        groups = 1
    return Layout(shape, dim, axis, groups)


@st.composite
def palettes(draw: st.DrawFn) -> Palette:
    layout, width = draw(layouts()), draw(bits)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    lut = random.normal(size=(layout.groups, 1 << width, layout.dim)).astype(np.float16)
    indices = random.integers(0, 1 << width, layout.index_shape, dtype=np.uint8)
    return Palette(width, layout, lut, indices)


@settings(deadline=None)
@given(bits, st.integers(0, 200), st.randoms())
def test_pack_is_exact_and_reversible(width: int, count: int, random: object) -> None:
    values = np.array([random.randrange(1 << width) for _ in range(count)], np.uint8)  # type: ignore[attr-defined]
    packed = pack(values, width)
    assert packed.size == packed_size(count, width) == math.ceil(count * width / 8)
    assert np.array_equal(unpack(packed, width, count), values)


def test_packing_is_little_endian() -> None:
    assert pack(np.array([1, 2, 3, 0], np.uint8), 2).tolist() == [0b00_11_10_01]
    assert pack(np.array([5, 6], np.uint8), 3).tolist() == [0b00_110_101]


def test_unpack_does_not_trust_the_count() -> None:
    with pytest.raises(InvalidInput, match="1000000000000 indices of 4 bits need"):
        unpack(np.zeros(8, np.uint8), 4, 10**12)


@settings(deadline=None)
@given(layouts())
def test_layout_round_trip(layout: Layout) -> None:
    weight = torch.arange(layout.size, dtype=torch.float32).reshape(layout.shape)
    trailing = len(layout.shape) - 1 - layout.axis
    padded = F.pad(weight, [0, 0] * trailing + [0, layout.padding])
    vectors = layout.to_vectors(padded)
    assert vectors.shape == (layout.groups, layout.vectors // layout.groups, layout.dim)
    assert torch.equal(layout.from_vectors(vectors), weight)


@settings(deadline=None)
@given(palettes())
def test_dense_looks_up_every_index(palette: Palette) -> None:
    layout, dense = palette.layout, palette.dense()
    assert dense.shape == layout.shape
    per_group = layout.shape[0] // layout.groups
    for place in np.ndindex(*layout.shape):
        index_place = list(place)
        index_place[layout.axis] //= layout.dim
        entry = palette.indices[tuple(index_place)]
        expected = palette.lut[place[0] // per_group, entry, place[layout.axis] % layout.dim]
        assert dense[place] == np.float32(expected)


@settings(deadline=None)
@given(palettes())
def test_nbytes_counts_indices_and_lut(palette: Palette) -> None:
    assert palette.nbytes == palette.packed.nbytes + palette.lut.nbytes


def test_difference_names_what_differs() -> None:
    layout = Layout((4, 2))
    zeros = np.zeros(layout.index_shape, np.uint8)
    lut = np.zeros((1, 4, 1), np.float16)
    palette = Palette(2, layout, lut, zeros)
    assert palette.difference(Palette(2, layout, lut.copy(), zeros.copy())) is None
    changed = lut.copy()
    changed[0, 1] = -0.0
    assert palette.difference(Palette(2, layout, changed, zeros)) == "1 of 4 LUT entries differ"
    swapped = zeros.copy()
    swapped[0, 0] = 3
    found = palette.difference(Palette(2, layout, lut, swapped))
    assert found == "1 of 8 indices differ"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (4, 0)}, "no values"),
        ({"shape": (4,), "axis": 1}, "axis 1 is not in 0..0"),
        ({"shape": (4,), "dim": 65}, "dim 65 is not in 1..64"),
        ({"shape": (4,), "groups": 3}, "groups 3 does not divide axis 0"),
        ({"shape": (8,), "groups": 4, "dim": 4}, "does not divide a group of 2 channels"),
    ],
)
def test_layout_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Layout(**arguments)  # type: ignore[arg-type]


def test_palette_refuses_contradictions() -> None:
    layout = Layout((4, 2))
    lut, indices = np.zeros((1, 4, 1), np.float16), np.zeros((4, 2), np.uint8)
    with pytest.raises(InvalidInput, match="LUT is float32"):
        Palette(2, layout, lut.astype(np.float32), indices)
    with pytest.raises(InvalidInput, match="indices exceed 2 bits"):
        Palette(2, layout, lut, indices + np.uint8(4))
    with pytest.raises(InvalidInput, match="not finite"):
        Palette(2, layout, lut + np.float16(np.inf), indices)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from((1, 2, 4)), st.floats(-18, 8))
def test_the_int8_grid(seed: int, dim: int, exponent: float) -> None:
    generator = np.random.default_rng(seed)
    centroids = (generator.normal(size=(2, 16, dim)) * 2.0**exponent).astype(np.float32)
    lut = to_int8_grid(centroids)
    layout = Layout((32, 8), dim, groups=2)
    indices = generator.integers(0, 16, layout.index_shape, dtype=np.uint8)
    quantized = Palette(4, layout, lut, indices).int8_lut
    assert quantized is not None
    steps, scale = quantized
    assert np.array_equal(steps.astype(np.float16) * scale, lut)
    assert np.array_equal(np.log2(scale.astype(float)) % 1, np.zeros_like(scale))
    # half of the smallest float16 is none
    assert np.abs(lut - centroids).max() <= 0.5 * float(scale.max())


@pytest.mark.parametrize("values", [[0.1, 1.0], [-0.0, 1.0]])
def test_a_lut_off_the_int8_grid(values: list[float]) -> None:
    lut = np.array(values, np.float16).reshape(1, 2, 1)
    assert Palette(1, Layout((8,)), lut, np.zeros(8, np.uint8)).int8_lut is None
