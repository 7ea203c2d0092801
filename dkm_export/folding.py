"""Fold batch norm into the layer before it, without touching a palette.

A target's own fold multiplies the dense weight by a factor per channel, which turns 16 distinct
values into thousands. Here the factor becomes the palette's ``scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dkm_export.palette import Palette

_aten = torch.ops.aten
_OUTPUT_AXIS = {
    _aten.conv1d.default: 0,
    _aten.conv2d.default: 0,
    _aten.conv3d.default: 0,
    _aten.conv1d.padding: 0,
    _aten.conv2d.padding: 0,
    _aten.conv3d.padding: 0,
    _aten.linear.default: 0,
    _aten.conv_transpose1d.default: 1,
    _aten.conv_transpose2d.input: 1,
}
"""Where the output channel stands in the weight of each operator that can absorb a batch norm."""


@dataclass(frozen=True)
class _Pair:
    layer: str
    batch_norm: str
    output_axis: int


def fold_batch_norm(
    module: nn.Module, palettes: Mapping[str, Palette], inputs: tuple[Tensor, ...]
) -> dict[str, Palette]:
    """Fold every batch norm of ``module``, in place, that directly follows a layer's only use.

    Afterwards the layer's weight is ``palette.dense()`` of the returned palette. Batch norms that
    follow anything else stay as they are.

    Args:
        module: in eval mode.
        palettes: the palettes of its weights, by parameter name.
        inputs: example inputs of ``forward``.

    Returns:
        ``palettes``, with ``scale`` set where a batch norm was folded in.
    """
    folded = dict(palettes)
    with torch.no_grad():
        for pair in _pairs(module, inputs):
            layer = module.get_submodule(pair.layer)
            norm = module.get_submodule(pair.batch_norm)
            assert isinstance(norm, _BatchNorm)
            scale, shift = _affine(norm)
            weight = layer.weight
            assert isinstance(weight, Tensor)
            along = [1] * weight.dim()
            along[pair.output_axis] = -1
            broadcast = scale.reshape(along)
            bias = layer.bias if isinstance(layer.bias, Tensor) else torch.zeros_like(scale)
            layer.weight = nn.Parameter(weight * broadcast, requires_grad=False)
            layer.bias = nn.Parameter(bias * scale + shift, requires_grad=False)
            module.set_submodule(pair.batch_norm, nn.Identity())
            name = f"{pair.layer}.weight" if pair.layer else "weight"
            if name in folded:
                folded[name] = replace(folded[name], scale=broadcast.numpy())
    return folded


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The batch norm in eval mode as ``scale * x + shift``."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _pairs(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[_Pair]:
    program = torch.export.export(module, inputs)
    signature = program.graph_signature
    owners = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def owner(node: object) -> str | None:
        """The module whose parameter or buffer ``node`` is, when this is its only use."""
        if isinstance(node, fx.Node) and node.name in owners and len(node.users) == 1:
            parameter: str = owners[node.name]
            return parameter.rpartition(".")[0]
        return None

    pairs = []
    for node in program.graph_module.graph.nodes:
        if node.target is not _aten.batch_norm.default:
            continue
        before, running_mean = node.args[0], node.args[3]
        layer = owner(before.args[1]) if before.target in _OUTPUT_AXIS else None
        batch_norm = owner(running_mean)
        if layer is None or batch_norm is None or len(before.users) > 1:
            continue
        axis = _OUTPUT_AXIS[before.target]
        weight = module.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        channels = before.meta["val"].shape[1]
        if (
            isinstance(module.get_submodule(batch_norm), _BatchNorm)
            and weight.shape[axis] == channels  # not so for a grouped transposed convolution
            and before.meta["val"].dim() == node.meta["val"].dim()
        ):
            pairs.append(_Pair(layer, batch_norm, axis))
    return pairs
