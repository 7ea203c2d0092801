"""The palettized weights of a module, and where a lowered program decodes them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

from executorch.exir.dialects._ops import ops as edge_ops
from torch import fx, nn
from torch.export import ExportedProgram

from dkm_export.palette import Palette
from dkm_exporters.executorch.decode import decode_rows, decode_weight, decoded_by, looks_up_rows

_EMBEDDING = edge_ops.edge.aten.embedding.default

Names = Iterable[tuple[str, ...]]
"""For each decode, the parameters that it is for."""


class Weights:
    """The weights under all the names that the module has for them.

    Attributes:
        palettes: by parameter name.
        owners: by each name of such a parameter, its name in ``palettes``.
    """

    def __init__(
        self, module: nn.Module, palettes: Mapping[str, Palette], ties: Mapping[str, str]
    ) -> None:
        self._module = module
        self.palettes = palettes
        self.owners = {name: name for name in palettes} | dict(ties)

    def decode_rows(self) -> None:
        """Let embeddings decode the rows that they look up."""
        for name, owner in self.owners.items():
            if looks_up_rows(self._module, name):
                decode_rows(self._module, name, self.palettes[owner])

    def decode(self, names: Container[str]) -> None:
        """Let these parameters be decoded where they are used, under any name."""
        for name, owner in self.owners.items():
            if owner in names:
                decode_weight(self._module, name, self.palettes[owner])

    def decodes(
        self, program: ExportedProgram, of_call: Callable[[fx.Node], Names] = lambda node: ()
    ) -> Iterator[tuple[str, ...]]:
        """The parameters of each decode of a lowered program, in the order in which it runs.

        Args:
            program: whose graph is in the order of its instructions.
            of_call: the decodes in what a node calls, for the nodes that are none themselves.
        """
        for node in program.graph.nodes:
            if name := self._decoded(node, program):
                yield (name,)
            else:
                yield from of_call(node)

    def _decoded(self, node: fx.Node, program: ExportedProgram) -> str | None:
        """The parameter that is decoded by looking vectors up in its LUT, if ``node`` does that."""
        if node.target is not _EMBEDDING:
            return None
        table: Any = node.args[0]
        # as float32, and for shared rows as scalars
        while table.op != "placeholder" and len(table.all_input_nodes) == 1:
            (table,) = table.all_input_nodes
        buffer = program.graph_signature.inputs_to_buffers.get(table.name)
        return self.owners.get(decoded_by(buffer or ""))
