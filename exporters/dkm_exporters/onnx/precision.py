"""Store what has no palette as float16, and say what that does to the outputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from dkm_export.errors import DkmWarning, Unsupported
from dkm_export.palette import Palette
from dkm_export.palettized import ModelSource
from dkm_export.samples import run_reference


def store_as_float16(
    graph: ir.Graph,
    module: nn.Module,
    palettes: Mapping[str, Palette],
    source: ModelSource,
    inputs: tuple[Tensor, ...],
) -> None:
    """Round float32 parameters, buffers and scales in the graph, in place, with a Cast after each.

    Constants of the model's code keep their type: they may be masks or limits. A warning gives the
    relative L2 error of the outputs on ``inputs``, by PyTorch.

    Args:
        graph: with decoders.
        module: that the graph was made of, in eval mode; its weights are rounded too.
        palettes: by parameter name.
        source: names the outputs.
        inputs: of ``module``.

    Raises:
        Unsupported: for a value that is too large for float16.
    """
    exact = run_reference(module, inputs, source)
    scales = [f"{name}.scale" for name, palette in palettes.items() if palette.scale is not None]
    for name in (*module.state_dict(), *scales):
        value = graph.initializers.get(name)
        if value is not None and value.dtype == ir.DataType.FLOAT:
            _round(graph, value, name)
    graph.sort()
    _round_module(module, palettes)
    rounded = run_reference(module, inputs, source)
    for name, expected, actual in zip(source.outputs, exact, rounded, strict=True):
        if not expected.is_floating_point():
            continue
        error = float(torch.linalg.norm((actual - expected).double()))
        size = float(torch.linalg.norm(expected.double()))
        change = f"{error / size:.1e} (relative L2" if size else f"{error:.1e} (L2"
        warnings.warn(
            f"onnx: float16 side data changes '{name}' by {change}, random inputs): side_data=fp32 "
            "keeps it as it is",
            DkmWarning,
            stacklevel=2,
        )


def _round(graph: ir.Graph, value: ir.Value, name: str) -> None:
    assert value.const_value is not None
    exact = value.const_value.numpy()
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    if not np.isfinite(half).all():
        raise Unsupported(
            f"onnx: {name} holds {np.abs(exact).max():.3g}, float16 ends at 65504: "
            "set side_data=fp32"
        )
    graph.initializers.pop(name)
    stored = ir.val(name, const_value=ir.tensor(half, name=name))
    graph.register_initializer(stored)
    cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name="")
    cast.outputs[0].name = f"{name}/Cast"
    graph.append(cast)
    value.replace_all_uses_with(cast.outputs[0])


def _round_module(module: nn.Module, palettes: Mapping[str, Palette]) -> None:
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.dtype != torch.float32:
                continue
            palette = palettes.get(name)
            if palette is None:
                tensor.copy_(tensor.half())
            elif palette.scale is not None:
                half = palette.scale.astype(np.float16).astype(np.float32)
                tensor.copy_(torch.from_numpy(replace(palette, scale=half).dense()))
