"""dkm-export: train with differentiable k-means, export the palettes, check every artifact.

The public names are loaded on first use, so that ``dkm --help`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dkm_export.checkpoint import load_checkpoint, save_checkpoint
    from dkm_export.compress import (
        finalize,
        freeze,
        measure_sensitivity,
        prepare,
        set_temperature,
        shard,
    )
    from dkm_export.errors import DkmError, ExitCode, GateFailed, InvalidInput, Unsupported
    from dkm_export.exporting.export import export
    from dkm_export.folding import fold_before_training
    from dkm_export.palette import Layout, Palette
    from dkm_export.palettized import InputSpec, ModelSource, PalettizedModel
    from dkm_export.parametrization import DkmSettings
    from dkm_export.spec import CompressionSpec, LayerKind, LayerRule
    from dkm_export.task import Task

_HOME = {
    "checkpoint": ("load_checkpoint", "save_checkpoint"),
    "compress": (
        "finalize",
        "freeze",
        "measure_sensitivity",
        "prepare",
        "set_temperature",
        "shard",
    ),
    "errors": ("DkmError", "ExitCode", "GateFailed", "InvalidInput", "Unsupported"),
    "exporting.export": ("export",),
    "folding": ("fold_before_training",),
    "palette": ("Layout", "Palette"),
    "palettized": ("InputSpec", "ModelSource", "PalettizedModel"),
    "parametrization": ("DkmSettings",),
    "spec": ("CompressionSpec", "LayerKind", "LayerRule"),
    "task": ("Task",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "CompressionSpec",
    "DkmError",
    "DkmSettings",
    "ExitCode",
    "GateFailed",
    "InputSpec",
    "InvalidInput",
    "LayerKind",
    "LayerRule",
    "Layout",
    "ModelSource",
    "Palette",
    "PalettizedModel",
    "Task",
    "Unsupported",
    "export",
    "finalize",
    "fold_before_training",
    "freeze",
    "load_checkpoint",
    "measure_sensitivity",
    "prepare",
    "save_checkpoint",
    "set_temperature",
    "shard",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
