"""What a program says about itself, as methods that return constants."""

from __future__ import annotations

from typing import Literal

from dkm_export.entry import PaletteEntry
from dkm_export.spec import Frozen

PALETTES_METHOD = "dkm_palettes"
"""Returns one string: a `Header` as JSON."""

INPUTS_METHOD = "dkm_inputs"
"""Returns the names of the inputs of ``forward``, in order."""


class Header(Frozen):
    """The palettes of a program.

    Attributes:
        layers: by parameter name.
        decodes: the parameter that each decode in ``forward`` is for, in the order in which the
            instructions run; a layer that is called twice is decoded twice.
    """

    schema_version: Literal[1] = 1
    layers: dict[str, PaletteEntry]
    decodes: tuple[str, ...]
