"""What a program says about itself, as methods that return constants."""

from __future__ import annotations

from typing import Literal

from dkm_export.entry import PaletteEntry
from dkm_export.spec import Frozen
from dkm_exporters.executorch.options import Backend

PALETTES_METHOD = "dkm_palettes"
"""Returns one string: a `Header` as JSON."""

INPUTS_METHOD = "dkm_inputs"
"""Returns the names of the inputs of ``forward``, in order."""


class Header(Frozen):
    """The palettes of a program.

    Attributes:
        backend: how weights are decoded, and by what.
        layers: by parameter name.
        decodes: the parameters that each decode of the program is for, in the order in which its
            instructions run. A layer that is called twice is decoded twice; layers with the same
            weight are decoded at once.
    """

    schema_version: Literal[2] = 2
    backend: Backend
    layers: dict[str, PaletteEntry]
    decodes: tuple[tuple[str, ...], ...]
