"""A fault in an artifact is named by its layer, on each runtime that shows its tensors."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import Tensor, nn

from dkm_export.checking.execution import check_runtime
from dkm_export.checking.gates import Gates
from dkm_export.checking.localisation import localise, record
from dkm_export.checking.metrics import LIMITS
from dkm_export.checking.reference import Reference, make_reference
from dkm_export.checking.report import Finding, Status
from dkm_export.checking.runtime import Arrays, Runtime
from dkm_export.errors import Unsupported
from dkm_export.exporting import Exporter
from dkm_export.palettized import InputSpec, PalettizedModel
from dkm_export.samples import make_samples
from dkm_export.spec import LayerRule
from dkm_exporters.coreml import CoreMLExporter, CoreMLOptions
from dkm_exporters.executorch import ExecuTorchExporter, ExecuTorchOptions
from dkm_exporters.onnx import OnnxExporter, OnnxOptions
from dkm_runtimes.coreml_reference import CoreMLReferenceRuntime
from dkm_runtimes.executorch import ExecuTorchRuntime
from dkm_runtimes.onnx_reference import OnnxReferenceRuntime
from dkm_runtimes.onnxruntime import OnnxRuntime, OrtRuntime, PackedOnnxRuntime
from tests.compiler import needs_compiler
from tests.networks import palettized
from tests.spoiling import (
    Spoil,
    change_entry,
    changed,
    in_onnx,
    initializer,
    padding_in_coreml,
    padding_in_xnnpack,
    replace_constant,
)
from tests.zoo import CASES, TOKENS, lively, palettize

HERE = "runtime_tests.test_localisation"
pytestmark = needs_compiler

EXECUTORCH, RUN_EXECUTORCH = ExecuTorchExporter(), ExecuTorchRuntime()
TARGETS: Mapping[str, tuple[Exporter[Any], Any, Runtime]] = {
    "onnx": (OnnxExporter(), OnnxOptions(), OnnxRuntime()),
    "coreml": (CoreMLExporter(), CoreMLOptions(precision="fp32"), CoreMLReferenceRuntime()),
    "xnnpack-lut": (EXECUTORCH, ExecuTorchOptions(), RUN_EXECUTORCH),
    "portable": (EXECUTORCH, ExecuTorchOptions(backend="portable"), RUN_EXECUTORCH),
}
Export = Callable[[str, str], Path]


@functools.cache
def model_of(network: str) -> PalettizedModel:
    if network in CASES:
        factory, inputs, rules = CASES[network]
        return palettize(f"tests.zoo:{factory}", inputs, *rules)
    return palettized(network, 4)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Export:
    def lower(target: str, network: str) -> Path:
        exporter, options, _ = TARGETS[target]
        model = model_of(network)
        return exporter.lower(model, model.build(), tmp_path_factory.mktemp("o"), options)

    return functools.cache(lower)


@pytest.fixture
def export(originals: Export, tmp_path: Path) -> Export:
    """A copy of the artifact of a target and a network, to spoil."""

    def copy(target: str, network: str) -> Path:
        original = originals(target, network)
        shutil.copytree(original.parent, tmp_path, dirs_exist_ok=True)
        return tmp_path / original.name

    return copy


def localised(artifact: Path, runtime: Runtime, model: PalettizedModel) -> Finding:
    specs = model.source.inputs
    inputs = {spec.name: x for spec, x in zip(specs, model.source.example_inputs(), strict=True)}
    limit = LIMITS[runtime.load(artifact).numeric_class].relative_l2
    return localise(artifact, runtime, model, inputs, limit)


def named(artifact: Path, target: str, network: str) -> str:
    """The layer that is named, and how many before it agree: ``head, 3``; or the message."""
    finding = localised(artifact, TARGETS[target][2], model_of(network))
    assert finding.status is Status.FAIL
    start, _, rest = finding.message.partition(" (")
    count = rest.rpartition("); ")[2].partition(" layers before it agree")[0]
    return f"{start.removeprefix('first wrong layer: ')}, {count}"


SLOW_PORTABLE = [
    pytest.param(target, marks=pytest.mark.slow) if target == "portable" else target
    for target in TARGETS
]


@pytest.mark.parametrize("network", ["mobilenet_v3", "vit"])
@pytest.mark.parametrize("target", SLOW_PORTABLE)
def test_a_right_artifact_agrees(target: str, network: str, originals: Export) -> None:
    finding = localised(originals(target, network), TARGETS[target][2], model_of(network))
    layers = {"mobilenet_v3": 19, "vit": 16}[network]
    assert finding.message.startswith(f"all {layers} layers and the outputs agree")


@pytest.mark.parametrize("target", SLOW_PORTABLE)
def test_every_tensor_of_a_transformer_is_shown(target: str, originals: Export) -> None:
    """In any order of its elements; what is overwritten on the way would be missing."""
    model, runtime = model_of("vit"), TARGETS[target][2]
    (image,) = model.source.example_inputs()
    tensors = runtime.intermediates(originals(target, "vit"), {"image": image.numpy()})
    shown = [np.sort(tensor, axis=None) for _, tensor in tensors]
    values = [step.value for step in record(model.build(), (image,)) if step.value is not None]
    assert len(values) > 70
    for value in values:
        expected = np.sort(value, axis=None)
        same = [tensor for tensor in shown if tensor.size == expected.size]
        assert any(np.allclose(tensor, expected, atol=1e-5) for tensor in same)


@pytest.mark.parametrize(
    ("network", "faults"),
    [
        # a residual network with depthwise layers, squeeze and excitation, folded batch norms
        ("mobilenet_v3", {"0": 0, "3.body.3": 4, "3.body.6.reduce": 6, "4.body.7": 16, "7": 18}),
        # a transformer
        ("vit", {"patches": 0, "layers.0.self_attn.out_proj": 5, "layers.1.linear1": 13}),
    ],
)
@pytest.mark.parametrize("target", SLOW_PORTABLE)
def test_a_changed_lut_entry(
    target: str, network: str, faults: Mapping[str, int], export: Export
) -> None:
    for layer, before in faults.items():
        artifact = export(target, network)
        change_entry(artifact, model_of(network).palettes[f"{layer}.weight"])
        assert named(artifact, target, network) == f"{layer}, {before}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "network"),
    [
        *((target, network) for target in TARGETS for network in ("vit", "unet", "gru")),
        *((target, case) for target in TARGETS if target != "coreml" for case in CASES),
    ],
)
def test_a_changed_lut_entry_in_any_layer(target: str, network: str, export: Export) -> None:
    for name, palette in model_of(network).palettes.items():
        artifact = export(target, network)
        change_entry(artifact, palette)
        assert named(artifact, target, network).startswith(f"{name.rpartition('.')[0]}, ")


def exchanged(first: str, second: str) -> Spoil:
    def edit(graph: onnx.GraphProto) -> None:
        one, other = initializer(graph, first), initializer(graph, second)
        one.raw_data, other.raw_data = other.raw_data, one.raw_data

    return in_onnx(edit)


def set_pads(graph: onnx.GraphProto) -> None:
    (node,) = [node for node in graph.node if "3.body.3.weight" in node.input]
    (pads,) = [attribute for attribute in node.attribute if attribute.name == "pads"]
    pads.ints[:] = [4, 4, 0, 0]


def set_operator(before: str, after: str) -> Callable[[onnx.GraphProto], None]:
    def edit(graph: onnx.GraphProto) -> None:
        (node, *_) = [node for node in graph.node if node.op_type == before]
        node.op_type = after

    return edit


ONNX_FAULTS: Mapping[str, tuple[str, Spoil, str]] = {
    "bias": ("mobilenet_v3", changed("3.body.6.reduce.bias", lambda x: x + 0.1), "reduce"),
    "no scale": ("mobilenet_v3", changed("4.body.0.weight.scale", np.ones_like), "4.body.0"),
    "padding": ("mobilenet_v3", in_onnx(set_pads), "3.body.3"),
    "indices of another layer": (
        "vit",
        exchanged("layers.0.linear1.weight.indices", "layers.1.linear1.weight.indices"),
        "layers.0.linear1",
    ),
    "transposed": (
        "vit",
        changed("layers.1.self_attn.out_proj.weight.indices", lambda x: x.reshape(32, 16)[::-1]),
        "layers.1.self_attn.out_proj",
    ),
    "norm": ("vit", changed("layers.0.norm2.weight", lambda x: x * 1.01), "layers.0.norm2"),
    "another parameter": ("vit", changed("positions", lambda x: x * 1.01), "positions"),
    "bias of attention": (
        "vit",
        changed("layers.1.self_attn.in_proj_bias", lambda x: x + 0.01),
        "layers.1.self_attn",
    ),
}


@pytest.mark.parametrize("fault", ONNX_FAULTS)
def test_faults_in_onnx(fault: str, export: Export) -> None:
    network, edit, layer = ONNX_FAULTS[fault]
    artifact = export("onnx", network)
    edit(artifact)
    assert layer in named(artifact, "onnx", network)


@pytest.mark.parametrize(
    ("target", "spoil"), [("coreml", padding_in_coreml), ("xnnpack-lut", padding_in_xnnpack)]
)
def test_another_padding(target: str, spoil: Spoil, export: Export) -> None:
    artifact = export(target, "mobilenet_v3")
    spoil(artifact)
    assert named(artifact, target, "mobilenet_v3") == "3.body.3, 4"


@pytest.mark.parametrize("target", SLOW_PORTABLE)
def test_a_changed_bias(target: str, export: Export) -> None:
    artifact = export(target, "mobilenet_v3")
    bias = model_of("mobilenet_v3").dense["3.body.6.reduce.bias"].numpy()
    replace_constant(artifact.parent, bias, bias + np.float32(0.1))
    assert named(artifact, target, "mobilenet_v3") == "3.body.6.reduce, 6"


def test_half_precision(tmp_path: Path) -> None:
    model = model_of("mobilenet_v3")
    artifact = CoreMLExporter().lower(model, model.build(), tmp_path, CoreMLOptions())
    runtime = CoreMLReferenceRuntime()
    assert localised(artifact, runtime, model).message.startswith("all 19 layers")
    change_entry(artifact, model.palettes["3.body.0.weight"])
    assert "layer: 3.body.0 (" in localised(artifact, runtime, model).message


def test_a_program_in_half_precision(tmp_path: Path) -> None:
    model = model_of("mobilenet_v3")
    options = ExecuTorchOptions(precision="fp16")
    artifact = EXECUTORCH.lower(model, model.build(), tmp_path, options)
    assert localised(artifact, RUN_EXECUTORCH, model).message.startswith("all 19 layers")
    change_entry(artifact, model.palettes["3.body.0.weight"])
    assert "layer: 3.body.0 (relative" in localised(artifact, RUN_EXECUTORCH, model).message


def test_a_program_for_several_batches(tmp_path: Path) -> None:
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=3))
    artifact = EXECUTORCH.lower(
        model, model.build(), tmp_path, ExecuTorchOptions(backend="xnnpack-ptd", max_batch=5)
    )
    change_entry(artifact, model.palettes["hidden.weight"])
    assert "layer: hidden (" in localised(artifact, RUN_EXECUTORCH, model).message


def test_weights_that_init_decodes(tmp_path: Path) -> None:
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=3))
    options = ExecuTorchOptions(backend="xnnpack-init")
    artifact = EXECUTORCH.lower(model, model.build(), tmp_path, options)
    change_entry(artifact, model.palettes["hidden.weight"])
    assert "layer: hidden (" in localised(artifact, RUN_EXECUTORCH, model).message


class Ends(nn.Module):
    """A layer with something after it that has no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.sigmoid(self.layer(rows))


def ends() -> nn.Module:
    return lively(Ends())


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        ("Tanh", "all 1 layers agree: the difference arises after them, in sigmoid in the model"),
        ("HardSigmoid", "first wrong step: sigmoid in the model (relative L2"),
    ],
)
def test_a_difference_after_the_layers(operator: str, message: str, tmp_path: Path) -> None:
    model = palettize(f"{HERE}:ends", (InputSpec(name="rows", shape=(3, 16)),), LayerRule(bits=3))
    artifact = OnnxExporter().lower(model, model.build(), tmp_path, OnnxOptions())
    in_onnx(set_operator("Sigmoid", operator))(artifact)
    assert localised(artifact, OnnxRuntime(), model).message.startswith(message)


@pytest.mark.parametrize("runtime", [PackedOnnxRuntime(), OnnxReferenceRuntime()])
def test_other_runtimes_of_onnx(runtime: Runtime, export: Export) -> None:
    artifact = export("onnx", "mobilenet_v3")
    changed("3.body.6.reduce.bias", lambda x: x + 0.1)(artifact)
    model = model_of("mobilenet_v3")
    assert "layer: 3.body.6.reduce (" in localised(artifact, runtime, model).message


@pytest.fixture(scope="module")
def reference() -> Reference:
    model = model_of("mobilenet_v3")
    return make_reference(model, make_samples(model.build(), model.source, None), None)


class Blind(OnnxRuntime):
    def intermediates(
        self, artifact: Path, inputs: Arrays
    ) -> Iterable[tuple[str, npt.NDArray[Any]]]:
        raise ZeroDivisionError("of a runtime\nin two lines")


def test_a_check_localises_what_fails(reference: Reference, export: Export) -> None:
    artifact = export("onnx", "mobilenet_v3")

    def found(runtime: Runtime) -> list[tuple[str, Status, str]]:
        report = check_runtime(artifact, runtime, reference, Gates())
        return [(f.check, f.status, f.message) for f in report.findings]

    assert [check for check, _, _ in found(OnnxRuntime())] == ["fidelity", "negative control"]
    changed("3.body.6.reduce.bias", lambda x: x + 0.1)(artifact)
    (fidelity, localisation, *_) = found(OnnxRuntime())
    assert fidelity[:2] == ("fidelity", Status.FAIL)
    assert localisation[:2] == ("localisation", Status.FAIL)
    assert localisation[2].startswith("first wrong layer: 3.body.6.reduce (")
    # what cannot be localised is no other verdict
    report = check_runtime(artifact, Blind(), reference, Gates())
    assert report.status is Status.FAIL
    assert report.findings[1] == Finding(
        check="localisation",
        status=Status.NOT_RUN,
        message="the first wrong layer is not known: of a runtime",
    )


def test_a_runtime_that_shows_outputs_only(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"outputs of an \.ort file are fixed"):
        OrtRuntime().intermediates(tmp_path / "x.ort", {})
