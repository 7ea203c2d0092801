"""What is stored in programs that ExecuTorch made without us, and in ours."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatbuffers
import pytest
import torch
from torch import Tensor, nn

from dkm_export.comparison import SAME, compare
from dkm_export.checkpoint import save_checkpoint
from dkm_export.errors import InvalidInput
from dkm_export.inspection import Inspection, inspect
from dkm_export.spec import LayerRule
from dkm_exporters.executorch import ExecuTorchExporter, ExecuTorchOptions
from dkm_exporters.executorch.options import Backend
from tests.foreign import encodings, named, network
from tests.zoo import IMAGE, TOKENS, palettize

pytest.importorskip("executorch")
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import ExecutorchBackendConfig, to_edge, to_edge_transform_and_lower

from dkm_exporters.executorch.program import ProgramFile
from dkm_exporters.executorch.tables import Table
from dkm_exporters.executorch.xnnpack import read_graph
from dkm_exporters.executorch.xnnpack_graph import read_constants
