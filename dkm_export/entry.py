"""The numbers of a palette as JSON: how checkpoints, manifests and artifacts describe a layer."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field

from dkm_export.palette import Layout, Palette
from dkm_export.spec import Bits, Dim, Frozen

# Sizes come from files: beyond these, the arithmetic on them would itself become a burden.
_Size = Annotated[int, Field(ge=1, lt=2**63)]
_MOST_AXES = 8


class PaletteEntry(Frozen):
    """Bits and layout of one palette; see `Layout` for the rest."""

    bits: Bits
    dim: Dim
    axis: Annotated[int, Field(ge=0, lt=_MOST_AXES)]
    groups: _Size
    shape: Annotated[tuple[_Size, ...], Field(max_length=_MOST_AXES)]

    @classmethod
    def of(cls, palette: Palette) -> Self:
        """Describe ``palette``."""
        layout = palette.layout
        return cls(
            bits=palette.bits,
            dim=layout.dim,
            axis=layout.axis,
            groups=layout.groups,
            shape=layout.shape,
        )

    @property
    def layout(self) -> Layout:
        """The layout; raises InvalidInput when the numbers do not fit each other."""
        return Layout(self.shape, self.dim, self.axis, self.groups)
