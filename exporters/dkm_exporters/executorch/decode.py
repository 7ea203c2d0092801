"""The decode of a palette as part of the graph, in operators that stock ExecuTorch runs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from dkm_export.fields import Field, fields, pack_fields
from dkm_export.palette import Palette


class _Decoder(nn.Module):
    """What the decodes have in common: a LUT, and tables that take packed bytes apart.

    Args:
        palette: the palette.
        dtype: of the weight, float32 or float16.

    Attributes:
        lut: float16 ``[groups * 2**bits, dim]``.
    """

    lut: Tensor

    def __init__(self, palette: Palette, dtype: torch.dtype) -> None:
        super().__init__()
        self._bits, self._layout, self._dtype = palette.bits, palette.layout, dtype
        self._fields = fields(palette.bits)
        for field in self._fields:
            if field.width < 8:  # a whole byte needs no table
                self.register_buffer(f"table{field.width}", torch.from_numpy(field.table()))
        self.register_buffer("lut", torch.from_numpy(palette.lut).flatten(0, 1))

    def _codes(self, packed: Tensor, count: int) -> Tensor:
        """int32 ``[..., count]``: the indices in the bytes of each row of `pack_fields`."""
        first, *others = (self._unpack(packed, field, count) for field in self._fields)
        return sum(others, start=first).int()

    def _unpack(self, packed: Tensor, field: Field, count: int) -> Tensor:
        """uint8: one field of every index, at its place."""
        if field.width == 8:
            return packed
        byte, bit = divmod(count * field.shift, 8)
        end = -(-count * (field.shift + field.width) // 8)
        table = self.get_buffer(f"table{field.width}")
        values = F.embedding(_slice(packed, byte, end).int(), table).flatten(-2)
        return _slice(values, bit // field.width, bit // field.width + count)


class Decode(_Decoder):
    """Parametrization whose original is the packed indices instead of a dense weight.

    As a parametrization it runs where the layer uses its weight, so that the memory plan holds a
    dense weight for the time of one layer only.

    Attributes:
        lut: as in `_Decoder`.
        offsets: int32 ``[groups, 1]``, the first row of each group's LUT; None for one group.
        scale: float32 that broadcasts to the weight, or None.
    """

    offsets: Tensor | None
    scale: Tensor | None

    def __init__(self, palette: Palette, dtype: torch.dtype) -> None:
        super().__init__(palette, dtype)
        self._packed = torch.from_numpy(pack_fields(palette.indices.reshape(-1), palette.bits))
        groups = palette.layout.groups
        starts = torch.arange(groups, dtype=torch.int32)[:, None] << palette.bits
        self.register_buffer("offsets", starts if groups > 1 else None)
        scale = None if palette.scale is None else torch.from_numpy(palette.scale)
        self.register_buffer("scale", scale)

    def right_inverse(self, _: Tensor) -> tuple[Tensor]:
        """The packed indices; a tuple, because a lone tensor would have to keep the dtype."""
        return (self._packed,)

    def forward(self, packed: Tensor) -> Tensor:
        """Flat uint8 to the weight of the layout's shape, times the scale."""
        weight = self._arrange(F.embedding(self._rows(packed), self.lut.to(self._dtype)))
        if self.scale is None:
            return weight
        return (weight.float() * self.scale).to(self._dtype)

    def _rows(self, packed: Tensor) -> Tensor:
        """int32: the row of ``lut`` for each vector."""
        rows = self._codes(packed, self._layout.vectors)
        if self.offsets is None:
            return rows
        return (rows.view(len(self.offsets), -1) + self.offsets).view(-1)

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


class RowDecode(_Decoder):
    """Takes the place of an embedding's ``forward``: decodes only the rows that are looked up.

    Where vectors lie along axis 0, ``dim`` rows share their indices.

    Attributes:
        lut: as in `_Decoder`.
        packed: uint8 ``[index_shape[0], ceil(index_shape[1] * bits / 8)]``, each row by itself.
    """

    packed: Tensor

    def __init__(self, palette: Palette, dtype: torch.dtype) -> None:
        super().__init__(palette, dtype)
        self.register_buffer("packed", torch.from_numpy(pack_fields(palette.indices, palette.bits)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Integers ``[...]`` to the dtype's ``[..., shape[1]]``."""
        layout = self._layout
        across = layout.axis == 0 and layout.dim > 1
        blocks = _divide(tokens, layout.dim) if across else tokens
        rows = self._codes(F.embedding(blocks, self.packed), layout.index_shape[1])
        if layout.groups > 1:
            group = _divide(tokens, layout.shape[0] // layout.groups)
            rows = rows + (group * (1 << self._bits)).int().unsqueeze(-1)
        lut = self.lut.to(self._dtype)
        if across:
            rows = rows * layout.dim + torch.remainder(tokens, layout.dim).int().unsqueeze(-1)
            lut = lut.view(-1, 1)
        vectors = F.embedding(rows, lut).flatten(-2)
        return _slice(vectors, 0, layout.shape[1])


def _slice(tensor: Tensor, start: int, end: int, axis: int = -1) -> Tensor:
    """``tensor[start:end]``, without an operator in the graph when that is all of it."""
    whole = (start, end) == (0, tensor.shape[axis])
    return tensor if whole else torch.slice_copy(tensor, axis, start, end)


def _divide(tensor: Tensor, divisor: int) -> Tensor:
    return torch.div(tensor, divisor, rounding_mode="floor")


def looks_up_rows(module: nn.Module, name: str) -> bool:
    """Whether the parameter ``name`` is the table of an embedding without side effects."""
    path, _, weight = name.rpartition(".")
    layer = module.get_submodule(path)
    return type(layer) is nn.Embedding and weight == "weight" and layer.max_norm is None


def decode_rows(module: nn.Module, name: str, palette: Palette) -> None:
    """Let the embedding whose table is ``name`` decode rows, in place.

    Its weight stays, for code that uses it otherwise.
    """
    layer = module.get_submodule(name.rpartition(".")[0])
    rows = RowDecode(palette, layer.get_parameter("weight").dtype)
    layer.add_module("dkm_rows", rows)
    layer.forward = lambda tokens: rows(tokens)


def decode_weight(module: nn.Module, name: str, palette: Palette) -> None:
    """Replace the weight ``name`` by its decode, in place."""
    path, _, weight = name.rpartition(".")
    layer = module.get_submodule(path)
    if not parametrize.is_parametrized(layer, weight):  # one module can have two names
        decode = Decode(palette, layer.get_parameter(weight).dtype)
        parametrize.register_parametrization(layer, weight, decode, unsafe=True)


def is_decode(node: fx.Node) -> bool:
    """Whether a node of an exported graph is part of a decode."""
    names = [module for _, module in node.meta.get("nn_module_stack", {}).values()]
    return any(name in _DECODES for name in names)


_DECODES = {f"{kind.__module__}.{kind.__qualname__}" for kind in (Decode, RowDecode)}


def decoded_by(lut: str) -> str:
    """The parameter that a LUT of this full name in the module decodes, or an empty string."""
    path, _, rest = lut.rpartition("parametrizations.")
    if rest.endswith(".0.lut"):
        return path + rest.removesuffix(".0.lut")
    path, _, rest = lut.rpartition("dkm_rows.")
    return f"{path}weight" if rest == "lut" else ""
