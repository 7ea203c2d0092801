"""Bytes of a plan's artifacts, from the targets themselves: a model of noise is exported.

What a file takes beside its weights only the target knows: operations, names, tables, padding.
Sizes do not depend on the values of weights, so random palettes of the plan's shapes will do.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dkm_export.checkpoint import save_checkpoint
from dkm_export.exporting.export import lower
from dkm_export.files import CHECKPOINT
from dkm_export.layers import LayerPlan, plan
from dkm_export.palette import Palette, to_int8_grid
from dkm_export.palettized import ModelSource, PalettizedModel
from dkm_export.planning.candidates import Targets
from dkm_export.spec import CompressionSpec

CHECKPOINT_ONLY = "checkpoint"
"""What is measured without targets."""

_LONG = -sys.float_info.min
"""A number with as many digits as there are; those of metrics are some bytes of a checkpoint."""


def mock_up(model: nn.Module, source: ModelSource, spec: CompressionSpec) -> PalettizedModel:
    """The model with random palettes as ``spec`` asks for, and everything else as it is."""
    generator = np.random.default_rng(0)
    layers = [layer for layer in plan(model, spec) if layer.bits is not None]
    palettes = {x.name: _noise(x, generator) for x in layers if not x.tied_to}
    ties = {layer.name: layer.tied_to for layer in layers if layer.tied_to}
    half = (torch.float16, torch.bfloat16)
    dense = {
        # copies: layers with two names share tensors, which no file holds
        name: tensor.clone().float() if tensor.dtype in half else tensor.clone()
        for name, tensor in model.state_dict().items()
        if name not in palettes and name not in ties
    }
    metrics = {"fp32": _LONG, "hard": _LONG} if source.task else {}
    # artifacts name their checkpoint
    return PalettizedModel(source, spec, palettes, dense, metrics, ties, sha256="0" * 64)


def artifact_bytes(model: PalettizedModel, targets: Targets, *, verbose: bool) -> dict[str, int]:
    """Bytes of each target's artifact, or of the checkpoint when there is no target.

    Raises:
        Unsupported: when a target cannot express the model.
    """
    sizes = {}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")  # about values, which are noise
        if not targets:
            file = Path(name, CHECKPOINT)
            save_checkpoint(model, file)
            return {CHECKPOINT_ONLY: file.stat().st_size}
        for exporter, options in targets:
            folder = Path(name, exporter.target)
            folder.mkdir()
            exporter.requires(model, options)
            artifact = lower(exporter, options, model, folder, verbose=verbose)
            sizes[exporter.target] = sum(file.stat().st_size for file in exporter.files(artifact))
    return sizes


def _noise(layer: LayerPlan, generator: np.random.Generator) -> Palette:
    assert layer.bits is not None
    layout, entries = layer.layout, 1 << layer.bits
    table = generator.standard_normal((layout.groups, entries, layout.dim)).astype(np.float32)
    lut = table.astype(np.float16) if layer.lut == "float16" else to_int8_grid(table)
    indices = generator.integers(0, entries, layout.index_shape, np.uint8)
    return Palette(layer.bits, layout, lut, indices)
