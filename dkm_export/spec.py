"""What to compress and how: an ordered list of rules over the layers of a model."""

from __future__ import annotations

from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dkm_export.palette import MAX_BITS, MAX_DIM


class LayerKind(StrEnum):
    """The layers whose ``weight`` can be palettized."""

    CONV = "conv"
    DEPTHWISE = "depthwise"
    CONV_TRANSPOSE = "conv_transpose"
    LINEAR = "linear"
    EMBEDDING = "embedding"


# strict: true, "4" and 4.0 are no numbers of bits
Bits = Annotated[int, Field(ge=1, le=MAX_BITS, strict=True)]
Dim = Annotated[int, Field(ge=1, le=MAX_DIM, strict=True)]
Lut = Literal["float16", "int8"]


class Frozen(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")


class LayerRule(Frozen):
    """Settings for the layers it matches: ``bits / dim`` bits per weight.

    Attributes:
        pattern: shell-style pattern over the parameter's full name (``features.*.weight``).
        kinds: layer kinds it applies to; None for all.
        bits: bits per index, 1 to 8; ``2**bits`` centroids.
        dim: consecutive weights along ``axis`` that share one index.
        axis: 0 is the output channel of convolutions and linear layers.
        groups: even splits of axis 0 that get a LUT each.
        lut: ``int8`` rounds each LUT to int8 times a power of two, which every target holds and
            Core ML can store in half the bytes.
        freeze: palettize once, before the training, and train only the other layers around it.
        skip: leave the layers dense.
    """

    pattern: str = "*"
    kinds: tuple[LayerKind, ...] | None = None
    bits: Bits | None = None
    dim: Dim = 1
    axis: Annotated[int, Field(ge=0)] = 0
    groups: Annotated[int, Field(ge=1)] = 1
    lut: Lut = "float16"
    freeze: bool = False
    skip: bool = False

    @model_validator(mode="after")
    def _bits_unless_skipped(self) -> Self:
        if self.skip == (self.bits is not None):
            raise ValueError("a rule has either bits (1 to 8) or skip = true")
        if self.skip and self.freeze:
            raise ValueError("a skipped layer has nothing to freeze")
        return self

    def matches(self, name: str, kind: LayerKind) -> bool:
        """Whether the rule applies to the parameter ``name`` of a layer of this kind."""
        return fnmatchcase(name, self.pattern) and (self.kinds is None or kind in self.kinds)


class CompressionSpec(Frozen):
    """Rules in order: the last one that matches a layer decides.

    Layers of fewer than ``small_layer_size`` weights are palettized at ``small_layer_bits`` with
    ``dim`` 1 instead, the convention of the DKM paper (section 4.1); set the size to 0 to switch
    that off. A layer that no rule matches, or that a palette would not make smaller than float16,
    stays dense.
    """

    rules: tuple[LayerRule, ...]
    small_layer_size: Annotated[int, Field(ge=0)] = 10_000
    small_layer_bits: Bits = 8

    def rule_for(self, name: str, kind: LayerKind, size: int) -> LayerRule | None:
        """The rule for a parameter of ``size`` weights, or None when it stays dense."""
        rule = next((rule for rule in reversed(self.rules) if rule.matches(name, kind)), None)
        if rule is None or rule.skip:
            return None
        if size < self.small_layer_size:
            return LayerRule(bits=self.small_layer_bits, lut=rule.lut, freeze=rule.freeze)
        return rule
