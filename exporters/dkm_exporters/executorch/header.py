"""What a program says about itself, as methods that return constants."""

from __future__ import annotations

from typing import Literal

from dkm_export.entry import PaletteEntry
from dkm_export.spec import Frozen
from dkm_exporters.executorch.options import Backend, Precision

PALETTES_METHOD = "dkm_palettes"
"""Returns one string: a `Header` as JSON."""

INPUTS_METHOD = "dkm_inputs"
"""Returns the names of the inputs of ``forward``, in order."""

TOKEN = "dkm_init.token"
"""The buffer in which ``forward`` sees whether ``init`` has run; xnnpack-init has these methods."""


class Header(Frozen):
    """The palettes of a program.

    Attributes:
        backend: how weights are decoded, and by what.
        precision: what it computes in; inputs and outputs are float32 either way.
        layers: by parameter name.
        decodes: the parameters that each decode of the program is for, in the order in which its
            instructions run, those of ``init`` first. A layer that is called twice is decoded
            twice; layers with the same weight are decoded at once.
        buffers: what instructions of ``forward`` take of that which ``init`` has written, in order:
            names of layers, and `TOKEN`.
    """

    schema_version: Literal[2] = 2
    backend: Backend
    precision: Precision
    layers: dict[str, PaletteEntry]
    decodes: tuple[tuple[str, ...], ...]
    buffers: tuple[str, ...] = ()
