"""The ONNX exporter: palettes bit for bit in the file and in ONNX Runtime."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from dkm_export.checkpoint import save_checkpoint
from dkm_export.compress import finalize, prepare
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.palette import Palette
from dkm_export.palettized import InputSpec, ModelSource, PalettizedModel
from dkm_export.spec import CompressionSpec, LayerRule
from dkm_exporters.onnx import OnnxExporter, OnnxOptions
from dkm_runtimes.onnxruntime import OnnxRuntime
from tests.closeness import relative_l2
from tests.zoo import IMAGE, TOKENS, lively, palettize

REPOSITORY = Path(__file__).parents[1]

CONVOLUTIONS = ("stem.0", "depthwise", "up", "line", "head")

MIXED = (
    LayerRule(bits=8),
    LayerRule(bits=5, dim=4),
    LayerRule(bits=4, dim=3, groups=4),
    LayerRule(bits=3, dim=2, axis=1),
    LayerRule(bits=2, dim=5),
    LayerRule(bits=7, groups=2),
    LayerRule(bits=6, dim=2, axis=1, groups=3),
    LayerRule(bits=1, dim=8),
)


def lower(model: PalettizedModel, folder: Path) -> Path:
    return OnnxExporter().lower(model, model.build(), folder, OnnxOptions())


def read(artifact: Path) -> dict[str, Palette]:
    return OnnxExporter().read_palettes(artifact)


def run_unoptimized(artifact: bytes, inputs: Mapping[str, Any]) -> list[npt.NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(artifact, options, providers=["CPUExecutionProvider"])
    outputs: list[npt.NDArray[Any]] = session.run(None, dict(inputs))
    return outputs


@pytest.mark.parametrize(
    ("factory", "inputs", "layers", "first"),
    [
        *(("convolutions", IMAGE, CONVOLUTIONS, first) for first in (0, 2, 4, 6)),
        *(("tokens", TOKENS, ("embedding", "hidden", "head"), first) for first in (0, 5)),
    ],
)
def test_equals_pytorch(
    factory: str,
    inputs: tuple[InputSpec, ...],
    layers: tuple[str, ...],
    first: int,
    tmp_path: Path,
) -> None:
    rules = [
        rule.model_copy(update={"pattern": f"{layer}.weight"})
        for layer, rule in zip(layers, (MIXED * 2)[first:], strict=False)
    ]
    model = palettize(f"tests.zoo:{factory}", inputs, *rules)
    assert len(model.palettes) == len(layers)
    artifact = lower(model, tmp_path)

    found = read(artifact)
    assert found.keys() == model.palettes.keys()
    for name, palette in model.palettes.items():
        assert palette.difference(found[name]) is None, name

    generator = torch.Generator().manual_seed(1)
    values = {spec.name: spec.random(generator) for spec in inputs}
    reference = model.build()(*values.values()).numpy()
    arrays = {name: value.numpy() for name, value in values.items()}
    session = OnnxRuntime().load(artifact)
    for (output,) in (session.run(arrays), run_unoptimized(artifact.read_bytes(), arrays)):
        assert output.dtype == np.float32
        assert relative_l2(output, reference) <= 1e-5


@pytest.fixture(scope="module")
def model() -> PalettizedModel:
    rules = (LayerRule(bits=4), LayerRule(pattern="head.weight", bits=3, dim=2))
    return palettize("tests.zoo:convolutions", IMAGE, *rules)


@pytest.fixture(scope="module")
def artifact(model: PalettizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lower(model, tmp_path_factory.mktemp("onnx"))


def test_holds_nothing_dense_and_no_traces(model: PalettizedModel, artifact: Path) -> None:
    proto = onnx.load(artifact)
    assert artifact.name == "convolutions.onnx"
    assert proto.ir_version == 8
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]
    shapes = {palette.layout.shape for palette in model.palettes.values()}
    assert not [t.name for t in proto.graph.initializer if tuple(t.dims) in shapes]
    assert artifact.stat().st_size < sum(4 * p.layout.size for p in model.palettes.values()) / 2
    for trace in (b"pkg.torch", b".py", str(REPOSITORY).encode(), str(artifact.parent).encode()):
        assert trace not in artifact.read_bytes()


def test_names_come_from_module_paths(model: PalettizedModel, artifact: Path) -> None:
    graph = onnx.load(artifact).graph
    assert [value.name for value in graph.input] == ["image"]
    assert [value.name for value in graph.output] == ["output"]
    (stem,) = [node for node in graph.node if node.name == "stem.0/Conv"]
    assert list(stem.input) == ["image", "stem.0.weight", "stem.0.bias"]
    sizes = {tensor.name: len(tensor.raw_data) for tensor in graph.initializer}
    for name, palette in model.palettes.items():
        assert sizes[f"{name}.indices"] + sizes[f"{name}.lut"] == palette.nbytes
    scaled = {name for name in sizes if name.endswith(".scale")}
    assert scaled == {"stem.0.weight.scale", "depthwise.weight.scale", "up.weight.scale"}


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"side_data": "fp16", "functions": True}, marks=pytest.mark.slow)],
)
def test_same_bytes_again_and_in_another_process(
    settings: dict[str, Any], model: PalettizedModel, tmp_path: Path
) -> None:
    options = OnnxOptions.model_validate(settings)
    artifact = OnnxExporter().lower(model, model.build(), tmp_path, options)
    save_checkpoint(model, tmp_path / "model.dkm.safetensors")
    script = f"""
from pathlib import Path
from dkm_export.checkpoint import load_checkpoint
from dkm_exporters.onnx import OnnxExporter, OnnxOptions
model = load_checkpoint(Path("model.dkm.safetensors"))
options = OnnxOptions.model_validate({settings!r})
OnnxExporter().lower(model, model.build(), Path("elsewhere"), options)
"""
    (tmp_path / "elsewhere").mkdir()
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "elsewhere" / artifact.name).read_bytes() == artifact.read_bytes()


class Twisted(nn.Module):
    """Names and outputs that collide: inputs returned, outputs twice, a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.attend = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, relu: Tensor) -> tuple[Tensor, ...]:
        x = torch.relu(self.layer(self.layer(relu)))
        y, _ = self.attend(x, x, x, need_weights=False)
        return relu, x, y, x, self.layer.weight


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y


class Untranslatable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.linalg.svdvals(self.layer(x))
        return y


def post_training(
    module: nn.Module, spec: InputSpec, *outputs: str
) -> tuple[PalettizedModel, nn.Module]:
    """The palettes of ``module``, and a module that holds their weights."""
    rules = CompressionSpec(rules=(LayerRule(bits=4),), small_layer_size=0)
    prepare(lively(module), rules)
    source = ModelSource(
        name="module", factory="unused:factory", inputs=(spec,), outputs=outputs or ("output",)
    )
    model = finalize(module, source)
    fresh = type(module)()
    fresh.load_state_dict(model.state_dict())
    return model, fresh.eval()


def test_names_that_collide(tmp_path: Path) -> None:
    outputs = ("linear", "conv", "layer", "val_0", "relu_1")
    model, module = post_training(Twisted(), InputSpec(name="relu", shape=(1, 3, 32)), *outputs)
    artifact = OnnxExporter().lower(model, module, tmp_path, OnnxOptions())
    graph = onnx.load(artifact).graph
    assert [value.name for value in graph.input] == ["relu"]
    assert [value.name for value in graph.output] == list(outputs)
    assert "CastLike" not in {node.op_type for node in graph.node}
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    for output, reference in zip(
        OnnxRuntime().load(artifact).run({"relu": x.numpy()}), module(x), strict=True
    ):
        assert relative_l2(output, reference) <= 1e-5


@pytest.mark.parametrize(
    ("network", "outputs", "error", "message"),
    [
        (Unused, ("output",), Unsupported, "idle.weight is not used"),
        (Untranslatable, ("output",), Unsupported, "aten._linalg_svd"),
        (Twisted, ("one", "two"), InvalidInput, "returns 5 outputs"),
    ],
)
def test_what_cannot_be_exported_is_named(
    network: type[nn.Module],
    outputs: tuple[str, ...],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    model, module = post_training(network(), InputSpec(name="x", shape=(1, 3, 32)), *outputs)
    with pytest.raises(error) as caught:
        OnnxExporter().lower(model, module, tmp_path, OnnxOptions())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_plugins_imports_no_backend() -> None:
    script = (
        "import sys, dkm_exporters.onnx.ort, dkm_runtimes.onnxruntime; "
        "sys.exit(bool({'torch', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
