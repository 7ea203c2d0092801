"""What is stored in a file, tensor by tensor, whoever wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from dkm_export.palette import Palette

NO_WEIGHT: Final = "no layer's weight"
"""The reason of biases, norms and constants."""

PALETTE: Final = "palette"
"""The encoding of a weight of which there are a LUT and indices, whatever these are stored as."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor, as it is stored.

    Attributes:
        name: in the file; a parameter's own name where it is one.
        shape: of the values that it stands for.
        encoding: in words: ``palette``, ``int8 per channel``, ``float32``.
        bits: of an index or a quantized value; None where values are stored as they are.
        dim: weights that share an index.
        groups: LUTs of a palette, scales of quantized values.
        axis: along which ``dim`` weights lie; None where that says nothing.
        value_bytes: of indices, of quantized values, or of the values themselves; a mask with them.
        lut_bytes: of LUTs, and of what scales these.
        scale_bytes: of scales and zero points.
        reason: why it is dense, or what else is to be known; empty where nothing tells.
        digest: of dense values, the same only for the same bytes; None where they are not known.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    bits: int | None = None
    dim: int = 1
    groups: int = 1
    axis: int | None = None
    value_bytes: int = 0
    lut_bytes: int = 0
    scale_bytes: int = 0
    reason: str = ""
    digest: str | None = None

    @property
    def nbytes(self) -> int:
        """All of its bytes."""
        return self.value_bytes + self.lut_bytes + self.scale_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each of the values that it stands for."""
        return 8 * self.nbytes / max(math.prod(self.shape), 1)


@dataclass(frozen=True)
class Description:
    """What is in an artifact.

    Attributes:
        files: that it consists of.
        tensors: all that are stored; those with ``bits`` are compressed, the others dense.
        palettes: by name, those of which LUT and indices are known bit for bit.
        unread: bytes of what was not taken apart, by what it is; None where that is elsewhere, in
            no file of the artifact.
    """

    files: Sequence[Path]
    tensors: Sequence[StoredTensor]
    palettes: Mapping[str, Palette] = field(default_factory=dict)
    unread: Mapping[str, int | None] = field(default_factory=dict)


def stored_palette(
    name: str,
    palette: Palette,
    *,
    value_bytes: int | None = None,
    lut_bytes: int | None = None,
    scale_bytes: int = 0,
) -> StoredTensor:
    """The entry of a palette; without other numbers, of packed indices and a float16 LUT."""
    layout = palette.layout
    return StoredTensor(
        name,
        layout.shape,
        PALETTE,
        palette.bits,
        layout.dim,
        layout.groups,
        layout.axis if layout.dim > 1 else None,
        palette.packed.nbytes if value_bytes is None else value_bytes,
        palette.lut.nbytes if lut_bytes is None else lut_bytes,
        scale_bytes,
    )


def distinct(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """The tensors, with a number where a name comes again: parts of a file have names of their own.

    Raises nothing; the first one keeps its name.
    """
    seen: dict[str, int] = {}
    result = []
    for tensor in tensors:
        name = tensor.name
        while name in seen:
            seen[tensor.name] += 1
            name = f"{tensor.name} ({seen[tensor.name]})"
        seen[name] = 1
        result.append(tensor if name == tensor.name else replace(tensor, name=name))
    return result
