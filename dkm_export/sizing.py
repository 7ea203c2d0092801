"""Bytes, counted twice: by the DKM paper's convention, and as they are stored.

The paper (Cho et al., ICLR 2022, section 4.1) clusters layers of fewer than 10,000 parameters at 8
bits. Its sizes are those of packed indices and LUTs with these layers, batch norm and biases at one
byte a number. It writes MB and means MiB: 25,557,032 parameters of ResNet-50 are 97.5 MiB in
float32, and a 29.4th of that is the 3.32 that it names. A checkpoint stores more: the LUTs of small
layers, float32 where there is no palette, counters, and the file's header.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dkm_export.layers import LayerPlan
from dkm_export.palette import Layout, lut_size, packed_size
from dkm_export.palettized import PalettizedModel
from dkm_export.spec import Frozen

_SMALL = 10_000
"""Parameters from which on the paper clusters a layer as its settings say."""

_INDICES, _LUTS, _LAYERS = "indices", "LUTs", "small layers"
_NORM, _OTHERS = "batch norm", "biases and other small tensors"
_LARGE, _COUNTERS, _HEADER = "large dense tensors", "counters", "file header"
_KINDS = (_INDICES, _LUTS, _LAYERS, _NORM, _OTHERS, _LARGE, _COUNTERS)

_STATISTICS = re.compile(r"[._]running_(mean|var)(_to_fp16)?$")
"""Of batch norm, as PyTorch and ML programs call them."""


class SizeLine(Frozen):
    """One kind of content, in bytes.

    Attributes:
        kind: what is counted.
        paper: by the paper's convention.
        stored: in the checkpoint.
    """

    kind: str
    paper: int
    stored: int


class Account(Frozen):
    """Where the bytes of a model go.

    Attributes:
        parameters: numbers that training changes; statistics of batch norm are none.
        lines: together everything that is stored.
    """

    parameters: int
    lines: tuple[SizeLine, ...]

    @property
    def paper(self) -> int:
        """Bytes by the paper's convention."""
        return sum(line.paper for line in self.lines)

    @property
    def stored(self) -> int:
        """Bytes of the checkpoint; without its header if the account is of no file."""
        return sum(line.stored for line in self.lines)

    @property
    def paper_ratio(self) -> float:
        """How many times smaller than float32 parameters, by the paper's convention."""
        return 4 * self.parameters / self.paper


@dataclass(frozen=True)
class DenseSize:
    """A tensor without a palette.

    Attributes:
        name: by which statistics of batch norm are told.
        count: of its values.
        nbytes: that they take.
        floating: whether they are floating point numbers.
    """

    name: str
    count: int
    nbytes: int
    floating: bool


def account(model: PalettizedModel, file_bytes: int | None = None) -> Account:
    """Count a palettized model; a tied weight once.

    Args:
        model: with palettes.
        file_bytes: size of its checkpoint, to count the header too.
    """
    palettes = [(palette.layout, palette.bits) for palette in model.palettes.values()]
    dense = [
        DenseSize(name, tensor.numel(), tensor.nbytes, tensor.is_floating_point())
        for name, tensor in model.dense.items()
    ]
    return account_sizes(palettes, dense, file_bytes)


def predict(layers: Sequence[LayerPlan], state: Mapping[str, Tensor]) -> Account:
    """Count what a plan would make of a model, before anything is done.

    Args:
        layers: the plan.
        state: the model's state dict.
    """
    chosen = [layer for layer in layers if layer.bits is not None]
    palettes = [(x.layout, x.bits) for x in chosen if x.bits is not None and not x.tied_to]
    planned = {layer.name for layer in chosen}
    dense = [
        # half-precision tensors are stored as float32
        DenseSize(
            name,
            tensor.numel(),
            tensor.numel() * max(4 * tensor.is_floating_point(), tensor.element_size()),
            tensor.is_floating_point(),
        )
        for name, tensor in state.items()
        if name not in planned
    ]
    return account_sizes(palettes, dense)


def account_sizes(
    palettes: Sequence[tuple[Layout, int]],
    dense: Sequence[DenseSize],
    file_bytes: int | None = None,
) -> Account:
    """Count what is known by its sizes alone.

    Args:
        palettes: layout and bits of each.
        dense: everything else.
        file_bytes: of the files that they are in, to count what else is there.
    """
    counted = list(_palette_lines(palettes)) + list(_dense_lines(dense))
    present = {line.kind for line in counted}
    kinds = [kind for kind in _KINDS if kind in present]
    lines = [
        SizeLine(
            kind=kind,
            paper=sum(line.paper for line in counted if line.kind == kind),
            stored=sum(line.stored for line in counted if line.kind == kind),
        )
        for kind in kinds
    ]
    if file_bytes is not None:
        header = file_bytes - sum(line.stored for line in lines)
        lines.append(SizeLine(kind=_HEADER, paper=0, stored=header))
    parameters = sum(layout.size for layout, _ in palettes) + sum(
        x.count for x in dense if x.floating and not _STATISTICS.search(x.name)
    )
    return Account(parameters=parameters, lines=tuple(lines))


def _palette_lines(palettes: Iterable[tuple[Layout, int]]) -> Iterator[SizeLine]:
    for layout, bits in palettes:
        indices, lut = packed_size(layout.vectors, bits), lut_size(layout, bits)
        if layout.size < _SMALL and (bits, layout.dim) == (8, 1):
            yield SizeLine(kind=_LAYERS, paper=layout.size, stored=indices + lut)
        else:
            yield SizeLine(kind=_INDICES, paper=indices, stored=indices)
            yield SizeLine(kind=_LUTS, paper=lut, stored=lut)


def _dense_lines(dense: Sequence[DenseSize]) -> Iterator[SizeLine]:
    norms = {_STATISTICS.sub("", x.name) for x in dense if _STATISTICS.search(x.name)}
    for tensor in dense:
        count, stored = tensor.count, tensor.nbytes
        if not tensor.floating:
            yield SizeLine(kind=_COUNTERS, paper=0, stored=stored)
        elif _STATISTICS.search(tensor.name) or tensor.name.rpartition(".")[0] in norms:
            yield SizeLine(kind=_NORM, paper=count, stored=stored)
        elif count < _SMALL:
            yield SizeLine(kind=_OTHERS, paper=count, stored=stored)
        else:
            yield SizeLine(kind=_LARGE, paper=stored, stored=stored)
