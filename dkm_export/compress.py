"""Attach differentiable k-means to a model, and turn the trained result into palettes.

After ``prepare(model, spec)`` any training loop goes on as before: the model's code, its loss and
the optimizer stay. ``finalize(model, source)`` then returns the palettes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dkm_export.clustering import assign, initial_centroids, mean_squared_distance, soft_cluster
from dkm_export.errors import InvalidInput
from dkm_export.layers import LayerPlan, plan, require_palettes
from dkm_export.palette import Palette
from dkm_export.palettized import ModelSource, PalettizedModel
from dkm_export.spec import CompressionSpec, Frozen

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
        eps: movement of the centroids, relative to the weights' standard deviation, that ends the
            iterations early.
    """

    tau: Positive = 0.5
    tau_unit: Literal["inertia", "absolute"] = "inertia"
    iterations: Annotated[int, Field(ge=1)] = 3
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4


class DkmWeight(nn.Module):
    """Parametrization of a weight: soft clusters in training, hard ones in eval mode.

    Attributes:
        centroids: float32 ``[groups, 2**bits, dim]``; each training step starts where the last
            one ended.
        tau: float32 ``[groups, 1, 1]``, temperature in squared units of the weights.
    """

    centroids: Tensor
    tau: Tensor

    def __init__(
        self,
        weight: Tensor,
        layer: LayerPlan,
        spec: CompressionSpec,
        settings: DkmSettings,
        seed: int,
    ) -> None:
        super().__init__()
        assert layer.bits is not None
        self.name, self.layout, self.bits = layer.name, layer.layout, layer.bits
        self.spec, self.settings = spec, settings
        vectors = self._vectors(weight)
        start = initial_centroids(vectors, 1 << layer.bits, seed)
        self.register_buffer("centroids", start)
        self.register_buffer("tau", torch.empty(self.layout.groups, 1, 1))
        self.set_temperature(weight, settings.tau)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as the layer sees it; same shape and dtype."""
        if self.training:
            vectors = self._vectors(weight)
            eps = self.settings.eps * float(vectors.detach().std())
            clusters = soft_cluster(
                vectors, self.centroids, self.tau, self.settings.iterations, eps
            )
            # a new tensor, not a copy into the old one, which the backward pass still needs
            self.centroids = clusters.centroids.detach()
            shaped: Tensor = self.layout.from_vectors(clusters.vectors)
            return shaped.to(weight.dtype)
        return torch.from_numpy(self.palette(weight).dense()).to(weight)

    def palette(self, weight: Tensor) -> Palette:
        """The weight with every vector snapped to its nearest centroid.

        The centroids are rounded to float16 before the assignment, so that a float16 target
        holds the very values that the indices were chosen for.
        """
        if not bool(self.centroids.abs().max() <= _LARGEST_FLOAT16):
            raise InvalidInput(
                f"{self.name}: centroids are not finite in float16 (largest "
                f"{float(self.centroids.abs().max()):g}): scale the layer down or skip it"
            )
        lut = self.centroids.half()
        indices = assign(self._vectors(weight.detach()), lut.float())
        return Palette(
            self.bits,
            self.layout,
            lut.cpu().numpy(),
            indices.to(torch.uint8).cpu().numpy().reshape(self.layout.index_shape),
        )

    @torch.no_grad()
    def set_temperature(self, weight: Tensor, tau: float) -> None:
        """Set the temperature from a value in the settings' unit."""
        if self.settings.tau_unit == "absolute":
            self.tau.fill_(tau)
            return
        vectors = self._vectors(weight)
        inertia = mean_squared_distance(vectors, self.centroids)
        # With as many centroids as distinct vectors nothing is left to soften: keep tau above 0.
        floor = 1e-6 * vectors.square().mean() + torch.finfo(torch.float32).tiny
        self.tau.copy_((tau * inertia).clamp(min=floor)[:, None, None])

    def _vectors(self, weight: Tensor) -> Tensor:
        if not bool(torch.isfinite(weight).all()):
            raise InvalidInput(f"{self.name}: weights are not finite: the training has diverged")
        trailing = weight.dim() - 1 - self.layout.axis
        padded = F.pad(weight.float(), [0, 0] * trailing + [0, self.layout.padding])
        vectors: Tensor = self.layout.to_vectors(padded)
        return vectors


def prepare(
    model: nn.Module,
    spec: CompressionSpec,
    settings: DkmSettings | None = None,
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda status, done, total: None,
) -> list[LayerPlan]:
    """Attach `DkmWeight` to every weight that ``spec`` selects, in place.

    Args:
        model: float, with the weights to start from.
        spec: what to compress and how.
        settings: how to cluster during training.
        seed: of the initial centroids.
        progress: told the layer, layers done and layers in all.

    Returns:
        What happens to each layer, including those that stay dense.

    Raises:
        InvalidInput: when the spec does not fit the model or selects nothing, or weights are not
            finite.
    """
    layers = plan(model, spec)
    require_palettes(layers)
    chosen = [layer for layer in layers if layer.bits is not None]
    for done, layer in enumerate(chosen, 1):
        module = model.get_submodule(_owner(layer.name))
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        dkm = DkmWeight(weight.detach(), layer, spec, settings or DkmSettings(), seed)
        # unsafe: leaves out a consistency check, which would run one step of the clustering
        parametrize.register_parametrization(module, "weight", dkm, unsafe=True)
        dkm.train(module.training)
        progress(f"clustering {layer.name}", done, len(chosen))
    return layers


def set_temperature(model: nn.Module, tau: float) -> None:
    """Set the temperature of all layers of a prepared model, in the unit of its settings."""
    for dkm, weight in _prepared(model):
        dkm.set_temperature(weight, tau)


@contextmanager
def soft_weights(model: nn.Module) -> Iterator[None]:
    """Within it, a prepared model in eval mode computes with soft weights; nothing is updated."""
    layers = [(dkm, dkm.training, dkm.centroids) for dkm, _ in _prepared(model)]
    try:
        for dkm, _, _ in layers:
            dkm.train()
        with parametrize.cached():
            yield
    finally:
        for dkm, training, centroids in layers:
            dkm.train(training)
            dkm.centroids = centroids


def finalize(
    model: nn.Module, source: ModelSource, metrics: Mapping[str, float] | None = None
) -> PalettizedModel:
    """The palettes of a prepared model, and a copy of everything else in its state dict.

    The result computes what ``model`` computes in eval mode. ``model`` is left as it is.

    Args:
        model: prepared, and trained since.
        source: how to build the model again.
        metrics: see `PalettizedModel`.

    Raises:
        InvalidInput: when ``model`` was not prepared, or weights or centroids are not finite.
    """
    layers = list(_prepared(model))
    if not layers:
        raise InvalidInput("the model has no DKM layers: call prepare(model, spec) first")
    palettes = {dkm.name: dkm.palette(weight) for dkm, weight in layers}
    prefixes = tuple(f"{_owner(name)}.parametrizations.weight.".lstrip(".") for name in palettes)
    dense = {
        name: tensor.detach().cpu().clone()
        for name, tensor in model.state_dict().items()
        if not name.startswith(prefixes)
    }
    return PalettizedModel(source, layers[0][0].spec, palettes, dense, metrics or {})


def _prepared(model: nn.Module) -> Iterator[tuple[DkmWeight, Tensor]]:
    """Every `DkmWeight` with the weight that it clusters."""
    for module in model.modules():
        if not parametrize.is_parametrized(module, "weight"):
            continue
        chains = module.parametrizations
        assert isinstance(chains, nn.ModuleDict)
        chain = chains["weight"]
        for parametrization in chain.children():
            if isinstance(parametrization, DkmWeight):
                assert isinstance(chain.original, Tensor)
                yield parametrization, chain.original


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]
