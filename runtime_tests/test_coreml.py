"""Core ML: palettes in the package are the model's, and interpreting it gives its outputs."""

from __future__ import annotations

import copy
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkm_export.checking.runtime import NumericClass
from dkm_export.compress import finalize, prepare
from dkm_export.errors import Unsupported
from dkm_export.palettized import InputSpec, ModelSource, PalettizedModel, load_state
from dkm_export.spec import CompressionSpec, LayerRule
from dkm_exporters.coreml import CoreMLExporter, CoreMLOptions
from dkm_runtimes.coreml import CoreMLRuntime
from dkm_runtimes.coreml_reference import CoreMLReferenceRuntime
from tests.closeness import relative_l2
from tests.zoo import IMAGE, TOKENS, lively, palettize

pytest.importorskip("coremltools")

TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2}
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"

CONVOLUTION_RULES = {
    "1 bit": [LayerRule(bits=1)],
    "2 bits in pairs": [LayerRule(bits=2, dim=2)],
    "3 bits in groups": [LayerRule(bits=3, groups=4)],
    "4 bits in fours": [LayerRule(bits=4, dim=4)],
    "6 bits in grouped pairs": [LayerRule(bits=6, dim=2, groups=2)],
    "8 bits": [LayerRule(bits=8)],
    "other axes": [
        LayerRule(pattern="stem*", bits=4, dim=3, axis=1),
        LayerRule(pattern="depthwise*", bits=4, dim=3, axis=3),
        LayerRule(pattern="up*", bits=3, dim=2, axis=2, groups=2),
        LayerRule(pattern="line*", bits=4, dim=8, axis=1, groups=3),
        LayerRule(pattern="head*", bits=2, dim=12, axis=1, groups=2),
    ],
}
TOKEN_RULES = {
    "long vectors": [LayerRule(bits=2, dim=48, axis=1)],
    "groups of scalars, axis 1": [LayerRule(bits=3, axis=1, groups=3)],
    "pairs": [LayerRule(bits=4, dim=2)],
}
BOTH_PRECISIONS = ("6 bits in grouped pairs", "other axes", "groups of scalars, axis 1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[PalettizedModel, Path]:
    """A model and its fp16 package."""
    torch.manual_seed(0)
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=4))
    return model, lower(model, tmp_path_factory.mktemp("tokens"), "fp16")


def lower(model: PalettizedModel, folder: Path, precision: str) -> Path:
    exporter, options = CoreMLExporter(), CoreMLOptions.model_validate({"precision": precision})
    exporter.requires(model, options)
    return exporter.lower(model, model.build(), folder, options)


def assert_same_palettes(model: PalettizedModel, artifact: Path) -> None:
    palettes = CoreMLExporter().read_palettes(artifact)
    assert palettes.keys() == model.palettes.keys()
    differences = {name: p.difference(palettes[name]) for name, p in model.palettes.items()}
    assert not any(differences.values()), differences


def assert_same_outputs(
    inputs: Sequence[InputSpec], module: nn.Module, artifact: Path, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    given = {spec.name: spec.random(generator) for spec in inputs}
    session = CoreMLReferenceRuntime().load(artifact)
    actual = session.run({name: tensor.numpy() for name, tensor in given.items()})
    with torch.no_grad():
        expected = module(*given.values())
    for index, (ours, theirs) in enumerate(
        zip(actual, expected if isinstance(expected, tuple) else (expected,), strict=True)
    ):
        assert ours.shape == theirs.shape, index
        assert relative_l2(ours, theirs) <= tolerance, index


@pytest.mark.parametrize(
    ("factory", "inputs", "rules", "precision"),
    [
        pytest.param(factory, inputs, rules, precision, id=f"{factory[10:]}, {name}, {precision}")
        for factory, inputs, cases in (
            ("tests.zoo:convolutions", IMAGE, CONVOLUTION_RULES),
            ("tests.zoo:tokens", TOKENS, TOKEN_RULES),
        )
        for name, rules in cases.items()
        for precision in (("fp32", "fp16") if name in BOTH_PRECISIONS else ("fp32",))
    ],
)
def test_palettes_and_outputs(
    factory: str,
    inputs: tuple[InputSpec, ...],
    rules: list[LayerRule],
    precision: str,
    tmp_path: Path,
) -> None:
    model = palettize(factory, inputs, *rules)
    assert len(model.palettes) >= 3
    artifact = lower(model, tmp_path, precision)
    assert_same_palettes(model, artifact)
    assert_same_outputs(inputs, model.build(), artifact, TOLERANCE[precision])
    session = CoreMLReferenceRuntime().load(artifact)
    assert session.numeric_class == NumericClass(precision)


def test_batch_norm_stays_separate(tmp_path: Path) -> None:
    from dkm_exporters.mlprogram.package import Package

    model = palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=4))
    kinds = [operation.kind for operation in Package(lower(model, tmp_path, "fp16")).operations]
    assert kinds.count("batch_norm") == 3
    assert kinds.count("constexpr_lut_to_dense") == len(model.palettes)


def test_equal_constants_are_stored_once(tmp_path: Path) -> None:
    from dkm_exporters.mlprogram.package import Package, Reference

    model = palettize("tests.zoo:convolutions", IMAGE, LayerRule(bits=4))
    package = Package(lower(model, tmp_path, "fp16"))
    constants = [
        (np.asarray(value).dtype, np.asarray(value).shape, str(value))
        for operation in package.operations
        if operation.kind == "const"
        for (value,) in operation.arguments.values()
        if not isinstance(value, Reference) and np.asarray(value).size < 10
    ]
    assert len(constants) == len(set(constants)) > 1


@pytest.mark.parametrize(("precision", "pair"), [("fp16", (6e-8, 1.2e-7)), ("fp32", (0.0, -0.0))])
def test_nearly_equal_palettes_stay_apart(
    precision: str, pair: tuple[float, float], tmp_path: Path
) -> None:
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=8))
    first, second = (model.palettes["embedding.weight"].lut.copy() for _ in range(2))
    # coremltools compares the first 100 values exactly, and only the others with a tolerance
    first[0, 200, 0], second[0, 200, 0] = pair
    ours = model.palettes["embedding.weight"]
    palettes = {"embedding.weight": replace(ours, lut=first)}
    palettes["hidden.weight"] = replace(ours, lut=second)
    twins = replace(model, palettes={**model.palettes, **palettes})
    assert_same_palettes(twins, lower(twins, tmp_path, precision))


def test_int64_inputs_become_int32(tmp_path: Path) -> None:
    inputs = (TOKENS[0].model_copy(update={"dtype": "int64"}),)
    model = palettize("tests.zoo:tokens", inputs, LayerRule(bits=4))
    assert_same_outputs(inputs, model.build(), lower(model, tmp_path, "fp32"), 1e-5)


def test_same_bytes_in_another_folder(tmp_path: Path) -> None:
    model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=4))
    (tmp_path / "other" / "place").mkdir(parents=True)
    first, second = (lower(model, tmp_path / name, "fp16") for name in ("other", "other/place"))
    assert len(digests(first)) == 3
    assert digests(first) == digests(second)


SCRIPT = """
import sys, torch
from pathlib import Path
from dkm_exporters.coreml import CoreMLExporter, CoreMLOptions
from tests.zoo import TOKENS, LayerRule, palettize
torch.manual_seed(0)
model = palettize("tests.zoo:tokens", TOKENS, LayerRule(bits=4))
CoreMLExporter().lower(model, model.build(), Path(sys.argv[1]), CoreMLOptions())
"""


@pytest.mark.slow
def test_same_bytes_in_another_process(
    tokens: tuple[PalettizedModel, Path], tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, check=True)
    assert digests(tokens[1]) == digests(tmp_path / tokens[1].name)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (LayerRule(bits=5), r"stem\.0\.weight: bits 5 .* allowed: 1, 2, 3, 4, 6, 8"),
        (LayerRule(bits=4, dim=5), r"stem\.0\.weight: dim 5 does not divide axis 0 of size 48"),
    ],
)
def test_unsupported_palettes_are_refused(rule: LayerRule, message: str) -> None:
    model = palettize("tests.zoo:convolutions", IMAGE, rule)
    with pytest.raises(Unsupported, match=message):
        CoreMLExporter().requires(model, CoreMLOptions())


class Unused(nn.Module):
    """Has a layer that its outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 16)
        self.forgotten = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y


class Gallery(nn.Module):
    """Apply each function to a layer's output and return all results."""

    def __init__(self, layer: nn.Module, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.functions = functions
        self.parts = nn.ModuleList(f for f in functions if isinstance(f, nn.Module))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x)
        return tuple(function(y) for function in self.functions)


def export(
    module: nn.Module,
    shape: tuple[int, ...],
    folder: Path,
    outputs: tuple[str, ...] = ("output",),
    name: str = "x",
) -> tuple[nn.Module, Path]:
    """Palettize a module that no factory makes: the dense reference and the fp32 package."""
    reference = copy.deepcopy(lively(module))
    spec = CompressionSpec(rules=(LayerRule(bits=4),), small_layer_size=0)
    prepare(module, spec)
    source = ModelSource(
        name="network",
        factory="none:none",
        inputs=(InputSpec(name=name, shape=shape),),
        outputs=outputs,
    )
    model = finalize(module, source)
    assert model.palettes
    load_state(reference, model.state_dict(), "reference")
    exporter, options = CoreMLExporter(), CoreMLOptions(precision="fp32")
    artifact = exporter.lower(model, copy.deepcopy(reference), folder, options)
    assert_same_palettes(model, artifact)
    return reference, artifact


IMAGE_FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    nn.Conv2d(8, 8, 3, dilation=2, padding="same"),
    nn.Conv2d(8, 8, 4, padding="same", groups=2),
    nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
    nn.InstanceNorm2d(8, affine=True),
    nn.GroupNorm(2, 8),
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.AvgPool2d(3, 2, 1),
    nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    nn.AdaptiveAvgPool2d(1),
    nn.Upsample(scale_factor=2),
    nn.Upsample(scale_factor=2, mode="bilinear"),
    nn.PixelShuffle(2),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.SiLU(),
    nn.ReLU6(),
    nn.LeakyReLU(0.1),
    nn.ELU(),
    nn.Mish(),
    lambda x: F.prelu(x, torch.linspace(0.1, 0.9, 8)),
    lambda x: x.flatten(1),
]
TOKEN_FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    nn.GELU("tanh"),
    nn.LayerNorm(8),
    lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True),
    lambda x: (x @ x.transpose(1, 2)).softmax(-1),
    lambda x: F.log_softmax(x, -1),
    lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1],
    lambda x: torch.cat([x, -x], 1),
    lambda x: torch.stack([x, x * x], 1),
    lambda x: x.flip(-1),
    lambda x: x[:, 1:4:2, ::3],
    lambda x: x[:, 0] + x[:, -1],
    lambda x: (x.abs() + 1).log() + x.exp().sqrt() + torch.rsqrt(x * x + 1) + 1 / (x.abs() + 2),
    lambda x: x.sin() * x.cos() + x.erf() + x.pow(3) - x.floor() + x.clamp(-1, 1) - x.sigmoid() / 3,
    lambda x: torch.where(torch.logical_or(x <= 0.1, torch.logical_not(x != 1)), x // 2, x % 2),
    lambda x: torch.maximum(x, x.mean()) + torch.minimum(x, x * 2) + F.softplus(x) + x.tanh(),
    lambda x: x.amax(1) + x.amin(1) + x.sum(1) + x.std(1),
    lambda x: F.pad(x, (1, 2, 3, 0), value=2.0),
    lambda x: x[:, :1].expand(2, 5, 8) + x.narrow(1, 1, 1).unsqueeze(1).squeeze(1),
    lambda x: F.normalize(x, dim=-1),
    lambda x: x.argmax(-1).float() + x.mean(-1),
    lambda x: x.permute(2, 0, 1).reshape(8, -1).T,
    lambda x: x.cumsum(1) + x.tril(),
]


@pytest.mark.parametrize(
    ("layer", "functions", "shape"),
    [
        (nn.Conv2d(4, 8, 3, padding=1), IMAGE_FUNCTIONS, (1, 4, 12, 12)),
        (nn.Linear(8, 8), TOKEN_FUNCTIONS, (2, 5, 8)),
        (nn.Conv3d(4, 8, 3, stride=2, padding=1), [nn.ConvTranspose3d(8, 4, 3)], (1, 4, 6, 6, 6)),
        (nn.Conv1d(4, 8, 3), [nn.ConvTranspose1d(8, 8, 3, stride=2, padding=1)], (1, 4, 12)),
    ],
    ids=["image", "tokens", "volume", "line"],
)
def test_operators(
    layer: nn.Module,
    functions: list[Callable[[Tensor], Tensor]],
    shape: tuple[int, ...],
    tmp_path: Path,
) -> None:
    outputs = tuple(f"output{index}" for index in range(len(functions)))
    reference, artifact = export(Gallery(layer, *functions), shape, tmp_path, outputs)
    inputs = (InputSpec(name="x", shape=shape),)
    assert_same_outputs(inputs, reference, artifact, 1e-5)


def test_unused_palettes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"forgotten\.weight: the model does not use"):
        export(Unused(), (1, 8), tmp_path)


def test_names_that_coremltools_changes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="the name 'tensor' became"):
        export(Gallery(nn.Linear(8, 16), F.relu), (1, 8), tmp_path, name="tensor")


def test_other_operators_names_are_free(tmp_path: Path) -> None:
    module = Gallery(nn.Linear(8, 16), F.relu)
    reference, artifact = export(module, (1, 8), tmp_path, ("relu",), "linear")
    assert_same_outputs((InputSpec(name="linear", shape=(1, 8)),), reference, artifact, 1e-5)


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_packages_of_coremltools_are_read(target: str, tmp_path: Path) -> None:
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.mil import Builder as mb

    generator = np.random.default_rng(0)
    weight = generator.choice(generator.normal(size=16).astype(np.float16), size=(32, 16))
    version = getattr(ct.target, target)

    @mb.program(input_specs=[mb.TensorSpec((1, 16))], opset_version=version)  # type: ignore[untyped-decorator]
    def program(x: Any) -> Any:
        return mb.linear(x=x, weight=weight.astype(np.float32), name="y")

    dense = ct.convert(
        program,
        minimum_deployment_target=version,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    settings = cto.OpPalettizerConfig(mode="unique", weight_threshold=1)
    config = cto.OptimizationConfig(global_config=settings)
    artifact = tmp_path / "theirs.mlpackage"
    cto.palettize_weights(dense, config).save(str(artifact))

    (palette,) = CoreMLExporter().read_palettes(artifact).values()
    assert palette.bits == 4
    assert np.array_equal(palette.dense(), weight.astype(np.float32))
    x = generator.normal(size=(1, 16)).astype(np.float32)
    (y,) = CoreMLReferenceRuntime().load(artifact).run({"x": x})
    assert relative_l2(y, torch.from_numpy(x @ weight.T.astype(np.float32))) < 1e-6


def test_core_ml_says_where_it_runs() -> None:
    if platform.system() == "Darwin":
        pytest.skip("this is macOS")
    assert CoreMLRuntime().unavailable() == "Core ML runs only on macOS"
    assert CoreMLReferenceRuntime().unavailable() is None


def test_plugins_import_no_torch() -> None:
    script = (
        "import sys, dkm_exporters.coreml, dkm_runtimes.coreml, dkm_runtimes.coreml_reference\n"
        "assert not {'torch', 'coremltools'} & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
