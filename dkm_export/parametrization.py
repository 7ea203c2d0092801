"""What takes a weight's place while a model is trained: its soft clusters, or its hard ones."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dkm_export.clustering import (
    Gradient,
    assign,
    inertia,
    initial_centroids,
    soft_cluster,
)
from dkm_export.errors import InvalidInput
from dkm_export.layers import LayerPlan
from dkm_export.palette import Layout, Palette, to_int8_grid
from dkm_export.sharding import Part, full, version
from dkm_export.spec import CompressionSpec, Frozen, Lut

_LARGEST_FLOAT16 = 65504.0

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DkmSettings(Frozen):
    """How the clustering layer works during training.

    Attributes:
        tau: softness of the assignment: a multiple of the mean squared distance to the nearest
            centroid, which makes one value fit all layers; with ``tau_unit = "absolute"``, the
            paper's temperature in squared units of the weights.
        tau_unit: what ``tau`` multiplies.
        iterations: most k-means iterations per training step.
        eps: movement of the centroids, relative to their standard deviation, that ends the
            iterations early.
        gradient: ``unrolled`` through all iterations, as in the paper; ``implicit`` at the fixed
            point, for many iterations; ``jacobian-free``, cheaper than both and less exact.
    """

    tau: Positive = 0.5
    tau_unit: Literal["inertia", "absolute"] = "inertia"
    iterations: Annotated[int, Field(ge=1)] = 3
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    gradient: Gradient = "unrolled"


class DkmWeight(nn.Module):
    """Parametrization of a weight: soft clusters in training, hard ones in eval mode.

    A step is what happens between two changes of the weight. Every forward pass of a step starts
    from the same centroids and so sees the same soft weight. A tied weight is clustered once for
    all of its layers, until a backward pass.

    Attributes:
        names: of the parameters that are this weight: more than one where it is tied.
        centroids: ``[groups, 2**bits, dim]``, float32 or wider; each step starts where the last
            one ended.
        tau: float64 ``[groups, 1, 1]``, temperature in squared units of the weights.
        steps: int64, how many there have been.
        frozen: hard in training too, and nothing moves.
    """

    centroids: Tensor
    tau: Tensor
    steps: Tensor

    def __init__(
        self,
        weight: Tensor,
        layer: LayerPlan,
        spec: CompressionSpec,
        settings: DkmSettings,
        seed: int,
        sensitivity: Tensor | None,
    ) -> None:
        super().__init__()
        assert layer.bits is not None
        self.names, self.layout, self.bits = [layer.name], layer.layout, layer.bits
        self.spec, self.settings = spec, settings
        self.lut, self.frozen = layer.lut, layer.freeze
        # Of a version of the weight: the centroids it started from, and what it looks like.
        self._start: tuple[object, Tensor] | None = None
        self._soft: tuple[object, Tensor] | None = None
        self._hard: tuple[object, Tensor] | None = None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=weight.device))
        self._state(weight, Part(layer.name, weight, layer.layout))
        if sensitivity is not None:
            sensitivity = vectors_of(sensitivity.to(weight.device), self.layout).sum(-1)
        vectors = vectors_of(weight, self.layout)
        start = initial_centroids(vectors, 1 << layer.bits, seed, sensitivity)
        self.register_buffer("centroids", start)
        tau = torch.ones(self.layout.groups, 1, 1, dtype=torch.float64, device=weight.device)
        self.register_buffer("tau", tau)
        self.set_temperature(weight, settings.tau)

    # a graph break around the clustering, which has its own gradient
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, weight: Tensor) -> Tensor:
        """The weight as the layer sees it; same shape and dtype."""
        if self.frozen or not self.training:
            return self._hard_weight(weight)
        part = Part(self.names[0], weight, self.layout)
        state = self._state(weight, part)
        tied = len(self.names) > 1
        if tied and torch.is_grad_enabled() and self._soft and self._soft[0] == state:
            return self._soft[1]
        if not self._start or self._start[0] != state:
            self._start = (state, self.centroids)
            self.steps += 1
        if not tied:
            return self._soft_weight(part, self._start[1])
        # Hidden from torch.utils.checkpoint, which would miss this when it runs the layer again
        # in the backward pass and finds the soft weight there already.
        with saved_tensors_hooks(_same, _same):
            soft = self._soft_weight(part, self._start[1])
        if soft.requires_grad:
            self._soft = (state, soft)
            soft.register_hook(self._used_up)
        return soft

    def palette(self, weight: Tensor) -> Palette:
        """The weight with every vector snapped to its nearest centroid.

        The centroids are rounded to float16 or the int8 grid before the assignment, so that a
        target holds the very values that the indices were chosen for. Every process that holds a
        part of the weight has to call it.
        """
        if not bool(self.centroids.abs().max() <= _LARGEST_FLOAT16):
            raise InvalidInput(
                f"{self.names[0]}: centroids are not finite in float16 (largest "
                f"{float(self.centroids.abs().max()):g}): scale the layer down or skip it"
            )
        weight = full(weight.detach())
        self._state(weight, Part(self.names[0], weight, self.layout))
        lut = rounded(self.centroids, self.lut)
        vectors = vectors_of(weight, self.layout).to(self.centroids.dtype)
        indices = assign(vectors, lut.to(vectors.dtype))
        return Palette(
            self.bits,
            self.layout,
            lut.cpu().numpy(),
            indices.to(torch.uint8).cpu().numpy().reshape(self.layout.index_shape),
        )

    @torch.no_grad()
    def set_temperature(self, weight: Tensor, tau: float) -> None:
        """Set the temperature from a value in the settings' unit."""
        self._soft = None
        if self.settings.tau_unit == "absolute":
            self.tau.fill_(tau)
            return
        part = Part(self.names[0], weight, self.layout)
        vectors = vectors_of(part.local, part.layout)
        sums = torch.stack(
            [inertia(vectors, self.centroids), vectors.double().square().sum((1, 2))]
        )
        distance, square = part.reduce(sums) * self.layout.groups / self.layout.vectors
        # With as many centroids as distinct vectors nothing is left to soften: keep tau above 0.
        floor = 1e-6 * square + torch.finfo(torch.float64).tiny
        self.tau.copy_(torch.maximum(tau * distance, floor)[:, None, None])

    def forget_step(self) -> None:
        """Let the next forward pass be the first of its step."""
        self._start = self._soft = None

    def __getstate__(self) -> dict[str, Any]:
        # What is kept for a step belongs to an autograd graph, which cannot be copied.
        return {**self.__dict__, "_start": None, "_soft": None, "_hard": None}

    def _soft_weight(self, part: Part, start: Tensor) -> Tensor:
        clusters = soft_cluster(
            vectors_of(part.local, part.layout),
            start,
            self.tau,
            self.settings.iterations,
            self.settings.eps,
            self.settings.gradient,
            part.reduce if part.cut else None,
        )
        self.centroids = clusters.centroids
        return part.whole(part.layout.from_vectors(clusters.vectors))

    def _hard_weight(self, weight: Tensor) -> Tensor:
        part = Part(self.names[0], weight, self.layout)
        centroids = (self.centroids.data_ptr(), version(self.centroids))
        state = (self._state(weight, part), centroids)
        if not self._hard or self._hard[0] != state:
            dense = torch.from_numpy(self.palette(weight).dense())
            self._hard = (state, dense.to(weight.device, weight.dtype))
        return self._hard[1]

    def _used_up(self, gradient: Tensor) -> None:
        """A backward pass has begun, after which the soft weight's graph is gone."""
        self._soft = None

    def _state(self, weight: Tensor, part: Part) -> object:
        """What tells one state of the weight from the next, on all processes alike.

        Version counters do not: FSDP2 and optimizers of DTensors change weights behind them.

        Raises:
            InvalidInput: when the weight is not finite.
        """
        norm = torch.linalg.vector_norm(part.local.detach(), dtype=torch.float64)
        square = part.reduce(norm.square()).item()
        if not math.isfinite(square):
            raise InvalidInput(
                f"{self.names[0]}: weights are not finite (step {int(self.steps) + 1}): "
                "the training has diverged, lower the learning rate"
            )
        return square, version(weight)


def rounded(centroids: Tensor, lut: Lut) -> Tensor:
    """Centroids as a LUT holds them: float16 ``[groups, 2**bits, dim]``."""
    if lut == "float16":
        return centroids.half()
    grid = to_int8_grid(centroids.float().cpu().numpy())
    return torch.from_numpy(grid).to(centroids.device)


def vectors_of(weight: Tensor, layout: Layout) -> Tensor:
    """A weight cut into vectors ``[groups, vectors / groups, dim]``, padded with zeros."""
    if layout.padding:
        trailing = weight.dim() - 1 - layout.axis
        weight = F.pad(weight, [0, 0] * trailing + [0, layout.padding])
    vectors: Tensor = layout.to_vectors(weight)
    return vectors


def _same(tensor: Tensor) -> Tensor:
    return tensor
