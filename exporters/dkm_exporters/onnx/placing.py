"""Where the nodes of a decoder go: among the model's own, or into a function that the model calls.

A decoder is written once, for an `Inline`; a `Called` is the same with a function around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dkm_export.fields import Field

DOMAIN: Final = "dkm.lut"
"""Of the functions. A runtime that has an operator of the name may run that in its place."""

ONCE: Final = "dkm/"
"""How names begin of what decoders share."""

TABLE: Final = f"{ONCE}table/"
"""How names of tables begin."""


class Constants:
    """What the decoders of a model share, each once: tables, and a few integers."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._values: dict[str, ir.Value] = {}

    def initializer(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """The initializer of this name, which is made when it is asked for first."""

        def make() -> ir.Value:
            value = ir.val(name, const_value=ir.tensor(array, name=name))
            self.model.graph.register_initializer(value)
            return value

        return self.value(name, make)

    def value(self, name: str, make: Callable[[], ir.Value]) -> ir.Value:
        """The value of this name, which is made when it is asked for first."""
        if name not in self._values:
            self._values[name] = make()
        return self._values[name]


class Inline:
    """Among the model's own nodes.

    Args:
        constants: of the model.
        name: what the nodes are named after.
    """

    def __init__(self, constants: Constants, name: str) -> None:
        self._constants, self._name = constants, name

    def take(self, value: ir.Value, role: str) -> ir.Value:
        """A value of the model as it is called here; ``role`` says what it is to the decoder."""
        return value

    def once(self, name: str, make: Callable[[Inline], ir.Value]) -> ir.Value:
        """What ``make`` computes at the place that it is given, which several decoders share."""
        return self._constants.value(name, lambda: make(Inline(self._constants, name)))

    def table(self, width: int) -> ir.Value:
        """uint8 ``[256, 8 / width]``: the fields of this width in each byte."""
        table = self._constants.initializer(f"{TABLE}{width}", Field(width, 0).table())
        return self.take(table, f"table_{width}")

    def constant(self, array: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> ir.Value:
        """A few integers, at most one axis of them longer than 1."""
        rank = "" if array.ndim == 1 else f"/{array.ndim}d"
        name = f"{ONCE}{array.dtype}{rank}/{'x'.join(map(str, array.reshape(-1)))}"
        return self._constants.initializer(name, array)

    def node(self, operator: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        """The output of a new node."""
        # The output has the name. The node is numbered at the end, which takes fewer bytes.
        node = ir.node(operator, inputs, attributes, name="")
        node.outputs[0].name = f"{self._name}/{operator}"
        self._append(node)
        return node.outputs[0]

    def finish(self, value: ir.Value, function: str) -> ir.Value:
        """The decoder's output as a value of the model, and what a function for it is called."""
        return value

    def _append(self, node: ir.Node) -> None:
        self._constants.model.graph.append(node)


class Called(Inline):
    """In a function of the domain `DOMAIN`; decoders that are alike share it."""

    def __init__(self, constants: Constants, name: str) -> None:
        super().__init__(constants, name)
        self._inputs: dict[ir.Value, ir.Value] = {}
        self._nodes: list[ir.Node] = []

    def take(self, value: ir.Value, role: str) -> ir.Value:
        return self._inputs.setdefault(value, ir.val(role))

    def once(self, name: str, make: Callable[[Inline], ir.Value]) -> ir.Value:
        return make(self)

    def constant(self, array: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> ir.Value:
        return self.node("Constant", [], value=ir.tensor(array))

    def node(self, operator: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        output = super().node(operator, inputs, **attributes)
        # not named after the weight: the function serves several
        output.name = f"{operator}_{len(self._nodes)}"
        return output

    def finish(self, value: ir.Value, function: str) -> ir.Value:
        model = self._constants.model
        version = model.graph.opset_imports[""]
        body = ir.Graph(
            list(self._inputs.values()),
            [value],
            nodes=self._nodes,
            opset_imports={"": version},
            name=function,
        )
        model.functions.setdefault(
            (DOMAIN, function, ""), ir.Function(DOMAIN, function, graph=body, attributes=())
        )
        model.graph.opset_imports[DOMAIN] = 1
        call = ir.node(function, list(self._inputs), domain=DOMAIN, name=f"{self._name}/{function}")
        model.graph.append(call)
        return call.outputs[0]

    def _append(self, node: ir.Node) -> None:
        self._nodes.append(node)
