"""Attach differentiable k-means to a model, and turn the trained result into palettes.

After ``prepare(model, spec)`` any training loop goes on as before: the model's code, its loss and
the optimizer stay. ``finalize(model, source)`` then returns the palettes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from dkm_export.errors import InvalidInput
from dkm_export.folding import folded_norms
from dkm_export.layers import LayerPlan, plan, require_palettes
from dkm_export.palettized import ModelSource, PalettizedModel
from dkm_export.parametrization import DkmSettings, DkmWeight
from dkm_export.sharding import cut_axis, distribute, full
from dkm_export.spec import CompressionSpec


def prepare(
    model: nn.Module,
    spec: CompressionSpec,
    settings: DkmSettings | None = None,
    *,
    seed: int = 0,
    sensitivity: Mapping[str, Tensor] | None = None,
    progress: Callable[[str, int, int], None] = lambda status, done, total: None,
) -> list[LayerPlan]:
    """Attach `DkmWeight` to every weight that ``spec`` selects, in place.

    Args:
        model: with the weights to start from, in float32, bfloat16 or float16.
        spec: what to compress and how.
        settings: how to cluster during training.
        seed: of the initial centroids.
        sensitivity: how much each weight's squared error counts for the initial centroids, by
            parameter name, of the weights' shapes and at least 0; see `measure_sensitivity`.
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
    attached: dict[str, DkmWeight] = {}
    for done, layer in enumerate(chosen, 1):
        module = model.get_submodule(_owner(layer.name))
        if layer.tied_to:
            dkm = attached[layer.tied_to]
            dkm.names.append(layer.name)
        else:
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            importance = None if sensitivity is None else sensitivity.get(layer.name)
            if importance is not None and importance.shape != weight.shape:
                raise InvalidInput(
                    f"the sensitivity of {layer.name} is {list(importance.shape)}, "
                    f"the weight {list(weight.shape)}"
                )
            settings = settings or DkmSettings()
            dkm = DkmWeight(weight.detach(), layer, spec, settings, seed, importance)
            attached[layer.name] = dkm
            weight.requires_grad_(weight.requires_grad and not dkm.frozen)
        if not parametrize.is_parametrized(module, "weight"):  # one module can have two names
            # unsafe: leaves out a consistency check, which would run one step of the clustering
            parametrize.register_parametrization(module, "weight", dkm, unsafe=True)
        dkm.train(module.training)
        progress(f"clustering {layer.name}", done, len(chosen))
    return layers


def measure_sensitivity(model: nn.Module, losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean squared gradient of each parameter: how much its error will matter, for `prepare`.

    Source: Kim et al., "SqueezeLLM", arXiv 2306.07629, section 4.1 (the diagonal of the Fisher
    information).

    Args:
        model: not yet prepared. Its gradients are cleared.
        losses: a loss for each batch: ``(loss(model(x), y) for x, y in batches)``.

    Raises:
        InvalidInput: when there are no losses.
    """
    model.zero_grad()
    sums: dict[str, Tensor] = {}
    count = 0
    for loss in losses:
        loss.backward()
        count += 1
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                square = parameter.grad.float().square()
                sums[name] = sums[name] + square if name in sums else square
        model.zero_grad()
    if not count:
        raise InvalidInput("measure_sensitivity needs at least one batch's loss")
    return {name: total / count for name, total in sums.items()}


def set_temperature(model: nn.Module, tau: float) -> None:
    """Set the temperature of all layers of a prepared model, in the unit of its settings."""
    for dkm, weight in _prepared(model):
        dkm.set_temperature(weight, tau)


def freeze(model: nn.Module, pattern: str = "*") -> None:
    """Keep the palettes of some layers of a prepared model as they are now.

    Args:
        model: prepared. The frozen weights ask for no gradient any more.
        pattern: shell-style pattern over full parameter names, as in a rule.

    Raises:
        InvalidInput: when no layer matches.
    """
    names = []
    for dkm, weight in _prepared(model):
        names += dkm.names
        if any(fnmatchcase(name, pattern) for name in dkm.names):
            dkm.frozen = True
            weight.requires_grad_(False)
    if not any(fnmatchcase(name, pattern) for name in names):
        raise InvalidInput(f"'{pattern}' matches no layer, allowed: {', '.join(names)}")


def shard(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Let each process of ``mesh`` keep and cluster a part of every weight of a prepared model.

    The weights become DTensors, cut between their vectors, and only sums of ``k (dim + 1)`` numbers
    per iteration are exchanged. Where a weight cannot be cut, every process keeps all of it. Make
    the optimizer afterwards, and call the model on every process, in eval mode too.

    Args:
        model: prepared, the same on every process.
        mesh: of one dimension.

    Returns:
        These weights, whose gradients are averaged already: the ``ignored_params`` of torch's
        ``fully_shard``, which can take care of all the others.
    """
    parts = set()
    for dkm, weight in list(_prepared(model)):
        assert isinstance(weight, nn.Parameter)
        part = distribute(weight, mesh, cut_axis(dkm.layout, mesh.size()))
        for _, chain in _chains(model):
            if chain.original is weight:
                chain.original = part
        dkm.forget_step()
        parts.add(part)
    return parts


@contextmanager
def soft_weights(model: nn.Module) -> Iterator[None]:
    """Within it, a prepared model in eval mode computes with soft weights; nothing is updated."""
    layers = [(x, x.training, x.centroids, x.steps.clone()) for x, _ in _prepared(model)]
    try:
        for dkm, *_ in layers:
            dkm.train()
        with parametrize.cached():
            yield
    finally:
        for dkm, training, centroids, steps in layers:
            dkm.train(training)
            dkm.centroids, dkm.steps = centroids, steps
            dkm.forget_step()


def finalize(
    model: nn.Module, source: ModelSource, metrics: Mapping[str, float] | None = None
) -> PalettizedModel:
    """The palettes of a prepared model, and a copy of everything else in its state dict.

    The result computes what ``model`` computes in eval mode, half-precision weights in float32.
    ``model`` is left as it is. Where weights are sharded, every process has to call it.

    Args:
        model: prepared, and trained since.
        source: how to build the model again.
        metrics: see `PalettizedModel`.

    Raises:
        InvalidInput: when ``model`` was not prepared, its batch norms are not what ``source`` says,
            or weights or centroids are not finite.
    """
    layers = list(_prepared(model))
    if not layers:
        raise InvalidInput("the model has no DKM layers: call prepare(model, spec) first")
    _require_agreement(model, source)
    palettes = {dkm.names[0]: dkm.palette(weight) for dkm, weight in layers}
    ties = {name: dkm.names[0] for dkm, _ in layers for name in dkm.names[1:]}
    names = [*palettes, *ties]
    prefixes = tuple(f"{_owner(name)}.parametrizations.weight.".lstrip(".") for name in names)
    dense = {
        name: _widened(full(tensor.detach())).cpu().clone()
        for name, tensor in model.state_dict().items()
        if not name.startswith(prefixes)
    }
    return PalettizedModel(source, layers[0][0].spec, palettes, dense, metrics or {}, ties)


def _require_agreement(model: nn.Module, source: ModelSource) -> None:
    """What could not be built again should show here."""
    folded = folded_norms(model)
    if folded and source.batch_norm == "separate":
        raise InvalidInput(
            f"the batch norm {folded[0]} was folded into the layer before it: give the source "
            "batch_norm='fold-before-training'"
        )
    if not folded and source.batch_norm != "separate":
        raise InvalidInput(
            f"the source says batch_norm='{source.batch_norm}' and no batch norm of the model was "
            "folded: call fold_before_training(model, inputs) before prepare"
        )


def _prepared(model: nn.Module) -> Iterator[tuple[DkmWeight, Tensor]]:
    """Every `DkmWeight`, tied ones once, with the weight that it clusters."""
    seen = set()
    for dkm, chain in _chains(model):
        if dkm not in seen:
            seen.add(dkm)
            assert isinstance(chain.original, Tensor)
            yield dkm, chain.original


def _chains(model: nn.Module) -> Iterator[tuple[DkmWeight, ParametrizationList]]:
    for module in model.modules():
        if not parametrize.is_parametrized(module, "weight"):
            continue
        chains = module.parametrizations
        assert isinstance(chains, nn.ModuleDict)
        chain = chains["weight"]
        assert isinstance(chain, ParametrizationList)
        for parametrization in chain.children():
            if isinstance(parametrization, DkmWeight):
                yield parametrization, chain


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]
