"""What `dkm plan` found: every layer's setting, the bytes of every target, the Pareto front."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from dkm_export.spec import Bits, Frozen, LayerKind

Count = Annotated[int, Field(ge=0, lt=2**63)]


class PlannedLayer(Frozen):
    """One layer's setting.

    Attributes:
        name: full parameter name.
        shape: of the weight.
        bits: per index, or None where the weight stays dense.
        bytes: packed indices and LUTs, or the dense weight.
        error: increase of the divergence from the float model's outputs, of this layer alone.
    """

    name: str
    kind: LayerKind
    shape: tuple[int, ...]
    bits: Bits | None
    dim: int
    groups: int
    bytes: Count
    error: FiniteFloat


class Point(Frozen):
    """A plan that could have been.

    Attributes:
        bytes: of palettes and of the weights that could have had one.
        error: predicted, of all layers together.
        name: of a uniform setting, as ``4/4``; empty for the best plan of this size.
    """

    bytes: Count
    error: FiniteFloat
    name: str = ""


class Plan(Frozen):
    """A whole plan.

    Attributes:
        model: its name.
        calibration: how errors of layers were found and on what, in words.
        budget: what was asked for, in words.
        limit: bytes that no file may exceed, or None where the budget is none of bytes.
        bytes: of each target's artifact, measured on a mock-up with the same shapes;
            ``checkpoint`` where no target was named.
        error: predicted, of all layers together.
        bound: no plan of these settings with as many bytes for palettes has a smaller error; what
            is left of the limit counts too.
        layers: in the order of the model.
        front: the best plans by size, ascending.
        uniform: the same setting for all layers but small ones, which have the recipe's bits for
            them; where every layer can have it.
    """

    schema_version: Literal[1] = 1
    model: str
    calibration: str
    budget: str
    limit: Count | None
    bytes: dict[str, Count]
    error: FiniteFloat
    bound: FiniteFloat
    layers: tuple[PlannedLayer, ...]
    front: tuple[Point, ...]
    uniform: tuple[Point, ...]

    @property
    def point(self) -> Point:
        """The plan itself, to be shown among the others."""
        return Point(
            name="this plan", bytes=sum(layer.bytes for layer in self.layers), error=self.error
        )
