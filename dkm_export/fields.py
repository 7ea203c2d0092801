"""How indices are packed so that table lookups can take them apart.

Graphs of standard operators have no types of 3, 5, 6 or 7 bits, and often no bit operators. So an
index is cut into fields of 4, 2 and 1 bits, and one field of all indices follows another: a byte
then holds whole fields, and one lookup in a table of 256 rows takes it apart. An index of 1, 2, 4
or 8 bits is a single field, and its packing is that of `dkm_export.palette.pack`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Field(NamedTuple):
    """Bits ``shift`` to ``shift + width`` of every index."""

    width: int
    shift: int

    def table(self) -> Bytes:
        """uint8 ``[256, 8 / width]``: the fields in each byte, at their place in the index."""
        starts = np.arange(0, 8, self.width)
        values = np.arange(256)[:, None] >> starts & ((1 << self.width) - 1)
        return (values << self.shift).astype(np.uint8)


def fields(bits: int) -> list[Field]:
    """The fields of an index, lowest bits and widest first: 7 bits are 4, 2 and 1.

    ``shift`` is a multiple of ``width``, so that no field straddles two bytes, wherever in the
    packed bytes the fields of its kind begin.
    """
    widths = [width for width in (8, 4, 2, 1) if bits & width]
    return [Field(width, bits & -(2 * width)) for width in widths]


def pack_fields(indices: Bytes | npt.NDArray[np.uint16], bits: int) -> Bytes:
    """Pack the last axis field by field into exactly ``ceil(n * bits / 8)`` bytes.

    Args:
        indices: ``[..., n]``.
        bits: of an index, 1 to 15.
    """
    raw = indices.astype("<u2")[..., None].view(np.uint8)
    codes = np.unpackbits(raw, axis=-1, count=bits, bitorder="little")
    start = (*indices.shape[:-1], -1)
    planes = [codes[..., shift : shift + width].reshape(start) for width, shift in fields(bits)]
    return np.packbits(np.concatenate(planes, axis=-1), axis=-1, bitorder="little")


def unpack_fields(packed: Bytes, bits: int, count: int) -> npt.NDArray[Any]:
    """Inverse of `pack_fields`, from exactly as many bytes.

    Returns:
        ``[..., count]`` indices, uint8, or uint16 where they have more than 8 bits.
    """
    stream = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
    shape = (*packed.shape[:-1], count)
    planes = [
        stream[..., count * shift : count * (shift + width)].reshape(*shape, width)
        for width, shift in fields(bits)
    ]
    codes = np.packbits(np.concatenate(planes, axis=-1), axis=-1, bitorder="little")
    return codes.view("<u2" if bits > 8 else np.uint8).reshape(shape)
