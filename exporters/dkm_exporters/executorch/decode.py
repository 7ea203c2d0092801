"""The decode of a palette as part of the graph, in operators that stock ExecuTorch runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dkm_export.fields import Field, fields, pack_fields
from dkm_export.palette import Palette


class Decode(nn.Module):
    """Parametrization whose original is the packed indices instead of a dense weight.

    As a parametrization it runs where the layer uses its weight, so that the memory plan holds a
    dense weight for the time of one layer only.

    Attributes:
        lut: float16 ``[groups * 2**bits, dim]``.
        offsets: int32 ``[groups, 1]``, the first row of each group's LUT; None for one group.
        scale: float32 that broadcasts to the weight, or None.
    """

    lut: Tensor
    offsets: Tensor | None
    scale: Tensor | None

    def __init__(self, palette: Palette) -> None:
        super().__init__()
        self._layout = palette.layout
        self._fields = fields(palette.bits)
        self._packed = torch.from_numpy(pack_fields(palette.indices.reshape(-1), palette.bits))
        for field in self._fields:
            if field.width < 8:  # a whole byte needs no table
                self.register_buffer(f"table{field.width}", torch.from_numpy(field.table()))
        self.register_buffer("lut", torch.from_numpy(palette.lut).flatten(0, 1))
        groups = palette.layout.groups
        starts = torch.arange(groups, dtype=torch.int32)[:, None] << palette.bits
        self.register_buffer("offsets", starts if groups > 1 else None)
        scale = None if palette.scale is None else torch.from_numpy(palette.scale)
        self.register_buffer("scale", scale)

    def right_inverse(self, _: Tensor) -> tuple[Tensor]:
        """The packed indices; a tuple, because a lone tensor would have to keep the dtype."""
        return (self._packed,)

    def forward(self, packed: Tensor) -> Tensor:
        """Flat uint8 to the float32 weight of the layout's shape, times the scale."""
        weight = self._arrange(F.embedding(self._rows(packed), self.lut.float()))
        return weight if self.scale is None else weight * self.scale

    def _rows(self, packed: Tensor) -> Tensor:
        """int32: the row of ``lut`` for each vector."""
        first, *others = (self._unpack(packed, field) for field in self._fields)
        rows = sum(others, start=first).int()
        if self.offsets is None:
            return rows
        return (rows.view(len(self.offsets), -1) + self.offsets).view(-1)

    def _unpack(self, packed: Tensor, field: Field) -> Tensor:
        """uint8: one field of every index, at its place."""
        if field.width == 8:
            return packed
        count = self._layout.vectors
        byte, bit = divmod(count * field.shift, 8)
        end = -(-count * (field.shift + field.width) // 8)
        table = self.get_buffer(f"table{field.width}")
        values = F.embedding(_slice(packed, byte, end).int(), table).view(-1)
        return _slice(values, bit // field.width, bit // field.width + count)

    def _arrange(self, vectors: Tensor) -> Tensor:
        """`Layout.from_vectors` with the fewest copies of the dense weight."""
        layout = self._layout
        before = math.prod(layout.shape[: layout.axis])
        along = layout.index_shape[layout.axis]
        after = math.prod(layout.shape[layout.axis + 1 :])
        if layout.dim > 1 and after > 1:
            # A reshape of a permuted view would copy twice: permute_copy is contiguous.
            blocks = vectors.view(before, along, after, layout.dim)
            vectors = torch.permute_copy(blocks, (0, 1, 3, 2))
        padded = vectors.view(before, along * layout.dim, after)
        return _slice(padded, 0, layout.shape[layout.axis], axis=1).view(layout.shape)


def _slice(tensor: Tensor, start: int, end: int, axis: int = 0) -> Tensor:
    """``tensor[start:end]``, without an operator in the graph when that is all of it."""
    whole = (start, end) == (0, tensor.shape[axis])
    return tensor if whole else torch.slice_copy(tensor, axis, start, end)


def attach(module: nn.Module, palettes: Mapping[str, Palette], ties: Mapping[str, str]) -> None:
    """Replace the palettized weights of ``module``, in place, by their decode.

    Tied ones have a decode each, whose equal constants ExecuTorch stores once.
    """
    for name, palette in {**palettes, **{n: palettes[owner] for n, owner in ties.items()}}.items():
        path, _, weight = name.rpartition(".")
        layer = module.get_submodule(path)
        if not parametrize.is_parametrized(layer, weight):  # one module can have two names
            parametrize.register_parametrization(layer, weight, Decode(palette), unsafe=True)


class DecodeTensors(NamedTuple):
    """Full names that the tensors of a decode have in the module, after `attach`."""

    packed: str
    lut: str


def decode_tensors(name: str) -> DecodeTensors:
    """The tensors that take the place of the parameter ``name``."""
    owner, dot, weight = name.rpartition(".")
    prefix = f"{owner}{dot}parametrizations.{weight}"
    return DecodeTensors(f"{prefix}.original0", f"{prefix}.0.lut")
