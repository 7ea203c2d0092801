"""Damaged files of every kind, ours and others': described or refused, and nothing else."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dkm_export.checkpoint import save_checkpoint
from dkm_export.cli.main import main
from dkm_export.errors import DkmError
from dkm_export.files import files_below
from dkm_export.inspection import inspect
from dkm_export.spec import LayerRule
from dkm_exporters.coreml import CoreMLExporter, CoreMLOptions
from dkm_exporters.executorch import ExecuTorchExporter, ExecuTorchOptions
from dkm_exporters.onnx import OnnxExporter, OnnxOptions
from dkm_exporters.onnx.ort import OrtExporter
from tests.foreign import IMAGE, network, to_onnx
from tests.mlpackages import save
from tests.mutations import mutated
from tests.zoo import TOKENS, palettize

_MOST_MEMORY = 100 << 20
"""Bytes that a file may take while it is read; the files have some thousands."""


def checkpoint(folder: Path) -> Path:
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=4))
    save_checkpoint(model, folder / "model.dkm.safetensors")
    return folder / "model.dkm.safetensors"


def ours(target: str, **settings: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        exporters: dict[str, tuple[Any, Any]] = {
            "coreml": (CoreMLExporter(), CoreMLOptions),
            "onnx": (OnnxExporter(), OnnxOptions),
            "ort": (OrtExporter(), OnnxOptions),
            "executorch": (ExecuTorchExporter(), ExecuTorchOptions),
        }
        exporter, options = exporters[target]
        model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=4))
        path: Path = exporter.lower(model, model.build(), folder, options(**settings))
        return path

    return make


def quantized_onnx(folder: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic

    path = to_onnx(folder / "float.onnx", external_data=False)
    quantize_dynamic(path, folder / "net.onnx")
    path.unlink()
    return folder / "net.onnx"


def onnx_with_data_beside(folder: Path) -> Path:
    return to_onnx(folder / "net.onnx", external_data=True)


def quantized_ort(folder: Path) -> Path:
    import onnxruntime

    source = quantized_onnx(folder)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "net.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    source.unlink()
    return folder / "net.ort"


def palettized_package(folder: Path) -> Path:
    import coremltools as ct
    import coremltools.optimize.coreml as cto

    module, inputs = network()
    model = ct.convert(
        torch.jit.trace(module, inputs),
        inputs=[ct.TensorType(name="image", shape=IMAGE)],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    config = cto.OpPalettizerConfig(nbits=4, weight_threshold=100, cluster_dim=2)
    config = cto.OptimizationConfig(global_config=config)
    return save(cto.palettize_weights(model, config), folder)


def xnnpack_program(folder: Path) -> Path:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(*network())
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    (folder / "net.pte").write_bytes(edge.to_executorch().buffer)
    return folder / "net.pte"


KINDS: dict[str, Callable[[Path], Path]] = {
    "checkpoint": checkpoint,
    "our-coreml": ours("coreml"),
    "our-onnx": ours("onnx"),
    "our-ort": ours("ort"),
    "our-executorch": ours("executorch"),
    "our-executorch-ptd": ours("executorch", backend="xnnpack-ptd"),
    "our-executorch-portable": ours("executorch", backend="portable"),
    "onnx": quantized_onnx,
    "onnx-with-data-beside": onnx_with_data_beside,
    "ort": quantized_ort,
    "coreml": palettized_package,
    "executorch": xnnpack_program,
}


@pytest.fixture(scope="module", params=KINDS)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp("artifact"))


@pytest.mark.parametrize("count", [50, pytest.param(300, marks=pytest.mark.slow)])
def test_damage_is_described_or_refused(
    count: int, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(artifact)]) == 0
    refused = 0
    for seed in range(count):
        folder = Path(shutil.copytree(artifact.parent, tmp_path / "copy"))
        rng = random.Random(seed)
        file = rng.choice(files_below(folder))
        file.write_bytes(mutated(file.read_bytes(), rng))
        before = memory("VmRSS")
        forget_peak()
        try:
            found = inspect(folder / artifact.name)
        except DkmError:
            refused += 1
        else:
            assert sum(found.totals.values()) == found.bytes, seed
            # with the size when zipped, the account and all that is printed
            assert main(["inspect", str(folder / artifact.name)]) == 0, seed
        assert memory("VmHWM") - before < _MOST_MEMORY, seed
        capsys.readouterr()
        shutil.rmtree(folder)
    assert count // 3 < refused < count, "not all damage is where it matters"


def memory(kind: str) -> int:
    """Bytes of this process, as Linux counts them: now, or the most since `forget_peak`."""
    found = re.search(rf"^{kind}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the most memory that a file takes cannot be told here: {error}")
