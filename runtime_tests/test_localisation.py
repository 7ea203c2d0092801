"""A fault in an artifact is named by its layer, on each runtime that shows its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from dkm_export.checking.localisation import localise
from dkm_export.checking.metrics import LIMITS
from dkm_export.checking.report import Status
from dkm_export.checking.runtime import Runtime
from dkm_export.exporting import Exporter
from dkm_export.palettized import PalettizedModel
from dkm_exporters.coreml import CoreMLExporter, CoreMLOptions
from dkm_exporters.executorch import ExecuTorchExporter, ExecuTorchOptions
from dkm_exporters.executorch.program import ProgramFile
from dkm_exporters.executorch.xnnpack import read_graph, replace_graph
from dkm_exporters.onnx import OnnxExporter, OnnxOptions
from dkm_runtimes.coreml_reference import CoreMLReferenceRuntime
from dkm_runtimes.executorch import ExecuTorchRuntime
from dkm_runtimes.onnxruntime import OnnxRuntime
from tests.compiler import needs_compiler
from tests.mlpackages import edit_model, operations
from tests.networks import palettized

pytestmark = needs_compiler

TARGETS: Mapping[str, tuple[Exporter[Any], Any, Runtime]] = {
    "onnx": (OnnxExporter(), OnnxOptions(), OnnxRuntime()),
    "coreml": (CoreMLExporter(), CoreMLOptions(), CoreMLReferenceRuntime()),
    "xnnpack-lut": (ExecuTorchExporter(), ExecuTorchOptions(), ExecuTorchRuntime()),
    "portable": (
        ExecuTorchExporter(),
        ExecuTorchOptions(backend="portable"),
        ExecuTorchRuntime(),
    ),
}
NETWORKS = ("mobilenet_v3", "vit")
