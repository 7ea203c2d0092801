"""Palettes: a weight stored as a small table of centroids (the LUT) and packed indices.

Terms follow Core ML and ONNX Runtime: ``bits`` per index, ``dim`` weights per index, ``groups``
of output channels with a LUT each. Everything here is numpy and knows no file and no module.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dkm_export.errors import InvalidInput

MAX_BITS: Final = 8
MAX_DIM: Final = 64


@dataclass(frozen=True)
class Layout:
    """How the values of a weight are cut into the vectors that share an index.

    ``dim`` consecutive elements along ``axis`` form one vector. ``groups`` split axis 0 evenly
    and have a LUT each. Where ``dim`` does not divide the axis, the last vector is padded and
    the padding is cut off again by `from_vectors`.

    Raises:
        InvalidInput: when the numbers do not fit the shape.
    """

    shape: tuple[int, ...]
    dim: int = 1
    axis: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        if not self.shape or any(size < 1 for size in self.shape):
            raise InvalidInput(f"shape {list(self.shape)} has no values to palettize")
        if not 0 <= self.axis < len(self.shape):
            raise InvalidInput(f"axis {self.axis} is not in 0..{len(self.shape) - 1}")
        if not 1 <= self.dim <= MAX_DIM:
            raise InvalidInput(f"dim {self.dim} is not in 1..{MAX_DIM}")
        if self.groups < 1 or self.shape[0] % self.groups:
            raise InvalidInput(f"groups {self.groups} does not divide axis 0 ({self.shape[0]})")
        if self.groups > 1 and self.axis == 0 and self.shape[0] // self.groups % self.dim:
            raise InvalidInput(
                f"dim {self.dim} does not divide a group of {self.shape[0] // self.groups} channels"
            )

    @property
    def padding(self) -> int:
        """Elements added at the end of ``axis`` to complete the last vector."""
        return -self.shape[self.axis] % self.dim

    @property
    def index_shape(self) -> tuple[int, ...]:
        """Shape of the index tensor: ``shape`` with ``axis`` divided by ``dim``, rounded up."""
        length = (self.shape[self.axis] + self.padding) // self.dim
        return (*self.shape[: self.axis], length, *self.shape[self.axis + 1 :])

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def vectors(self) -> int:
        """Number of vectors, and so of indices."""
        return math.prod(self.index_shape)

    @property
    def _blocks(self) -> tuple[int, int, int]:
        """(product of the sizes before the axis, indices along the axis, product after it)."""
        return (
            math.prod(self.shape[: self.axis]),
            self.index_shape[self.axis],
            math.prod(self.shape[self.axis + 1 :]),
        )

    def to_vectors(self, padded: Any) -> Any:
        """Cut a weight, already padded along ``axis``, into ``[groups, vectors / groups, dim]``.

        Takes and returns a numpy array or a torch tensor: both know ``reshape`` and ``swapaxes``.
        In memory the result is ``[groups, dim, vectors / groups]``: few long rows.
        """
        _, _, after = self._blocks
        blocks = padded.reshape(self.groups, -1, self.dim, after).swapaxes(1, 2)
        return blocks.reshape(self.groups, self.dim, -1).swapaxes(1, 2)

    def from_vectors(self, vectors: Any) -> Any:
        """Inverse of `to_vectors`, without the padding: a weight of ``shape``."""
        before, along, after = self._blocks
        rows = vectors.swapaxes(1, 2).reshape(self.groups, self.dim, -1, after)
        padded = rows.swapaxes(1, 2).reshape(before, along * self.dim, after)
        return padded[:, : self.shape[self.axis]].reshape(self.shape)


def pack(indices: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Pack indices of ``bits`` bits little-endian into exactly ``ceil(n * bits / 8)`` bytes."""
    planes = np.unpackbits(indices.reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return np.packbits(planes.reshape(-1), bitorder="little")


def unpack(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Inverse of `pack`: ``count`` indices as one uint8 each, in a flat array.

    Raises:
        InvalidInput: when ``packed`` is not exactly ``ceil(count * bits / 8)`` bytes.
    """
    expected = packed_size(count, bits)
    if packed.size != expected:
        raise InvalidInput(
            f"{count} indices of {bits} bits need {expected} bytes, not {packed.size}"
        )
    planes = np.unpackbits(packed.reshape(-1), count=count * bits, bitorder="little")
    return np.packbits(planes.reshape(count, bits), axis=1, bitorder="little").reshape(count)


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` indices of ``bits`` bits take."""
    return -(-count * bits // 8)


def lut_size(layout: Layout, bits: int) -> int:
    """Bytes that the float16 LUTs take."""
    return 2 * layout.groups * layout.dim * (1 << bits)


def palette_size(layout: Layout, bits: int) -> int:
    """Bytes of a palette: packed indices and float16 LUTs."""
    return packed_size(layout.vectors, bits) + lut_size(layout, bits)


def to_int8_grid(lut: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Round ``[groups, k, dim]`` so that each group is int8 times a power of two.

    Such values are float16 numbers too, so the same palette serves targets with and without int8.
    """
    scale = _int8_steps(lut)
    grid: npt.NDArray[np.float16] = (np.rint(lut / scale) * scale + 0.0).astype(np.float16)
    return grid


def _int8_steps(lut: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The least power of two of each group that brings its values to at most 127."""
    largest = np.abs(lut.astype(np.float32)).max((1, 2), keepdims=True)
    # at least the smallest float16 above 0, so that the steps are float16 numbers
    exponents = np.ceil(np.log2(np.maximum(largest / 127, 2.0**-24)))
    steps: npt.NDArray[np.float32] = np.exp2(exponents).astype(np.float32)
    return steps


@dataclass(frozen=True, eq=False)
class Palette:
    """A palettized weight.

    Attributes:
        bits: bits per index, 1 to 8.
        layout: shape of the weight and how it is cut into vectors.
        lut: float16 ``[groups, 2**bits, dim]``. float16, because every target can hold it exactly.
        indices: uint8 of ``layout.index_shape``, each below ``2**bits``.
        scale: None, or float32 that multiplies the decoded weight and broadcasts to its shape
            (per output channel, where a batch norm was folded in). Never part of a checkpoint.

    Raises:
        InvalidInput: when sizes, dtypes or values contradict each other.
    """

    bits: int
    layout: Layout
    lut: npt.NDArray[np.float16]
    indices: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise InvalidInput(f"bits {self.bits} is not in 1..{MAX_BITS}")
        expected = (self.layout.groups, 1 << self.bits, self.layout.dim)
        if self.lut.dtype != np.float16 or self.lut.shape != expected:
            raise InvalidInput(
                f"LUT is {self.lut.dtype}{list(self.lut.shape)}, expected float16{list(expected)}"
            )
        if not np.isfinite(self.lut).all():
            raise InvalidInput("LUT holds values that are not finite")
        if self.indices.dtype != np.uint8 or self.indices.shape != self.layout.index_shape:
            raise InvalidInput(
                f"indices are {self.indices.dtype}{list(self.indices.shape)}, "
                f"expected uint8{list(self.layout.index_shape)}"
            )
        if int(self.indices.max()) >> self.bits:
            raise InvalidInput(f"indices exceed {self.bits} bits")

    @cached_property
    def packed(self) -> npt.NDArray[np.uint8]:
        """The indices in ``ceil(n * bits / 8)`` bytes, little-endian."""
        return pack(self.indices, self.bits)

    @cached_property
    def int8_lut(self) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]] | None:
        """The LUT as int8 ``[groups, 2**bits, dim]`` times float16 ``[groups, 1, 1]``.

        None where that is not the same value for value. The factors are powers of two, as those
        of `to_int8_grid`.
        """
        scale = _int8_steps(self.lut)
        steps = self.lut.astype(np.float32) / scale
        if (steps != np.rint(steps)).any() or np.signbit(self.lut[self.lut == 0]).any():
            return None
        return steps.astype(np.int8), scale.astype(np.float16)

    @property
    def nbytes(self) -> int:
        """Exact payload: packed indices and the float16 LUT."""
        return palette_size(self.layout, self.bits)

    def dense(self) -> npt.NDArray[np.float32]:
        """The float32 weight: every index replaced by its centroid, times ``scale``."""
        groups = self.layout.groups
        flat = self.indices.reshape(groups, -1)
        vectors = self.lut.astype(np.float32)[np.arange(groups)[:, None], flat]
        weight = np.ascontiguousarray(self.layout.from_vectors(vectors))
        return weight if self.scale is None else weight * self.scale

    def difference(self, other: Palette) -> str | None:
        """Say how ``other`` differs in bits, layout, LUT or indices; None when bit-identical.

        ``scale`` is left out: it belongs to a target, not to the clustering.
        """
        theirs, ours = ({"bits": x.bits} | asdict(x.layout) for x in (other, self))
        changed = [
            f"{key} {theirs[key]} instead of {ours[key]}"
            for key in ours
            if theirs[key] != ours[key]
        ]
        if changed:
            return ", ".join(changed)
        for name, kind in (("lut", "LUT entries"), ("indices", "indices")):
            mine, its = getattr(self, name), getattr(other, name)
            # Compare bits, not values: -0.0 equals 0.0.
            differing = int((mine.view(f"u{mine.itemsize}") != its.view(f"u{its.itemsize}")).sum())
            if differing:
                return f"{differing} of {mine.size} {kind} differ"
        return None
