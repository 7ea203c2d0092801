"""The reference runtime on packages that coremltools alone has made: it computes what PyTorch does.

Networks are small, and converted without any part of this project.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkm_export.checking.check import check
from dkm_export.checking.report import Status
from dkm_export.checkpoint import save_checkpoint
from dkm_export.errors import ExitCode, InvalidInput, Unsupported
from dkm_export.exporting.export import export
from dkm_export.spec import LayerRule
from dkm_exporters.mlprogram.constants import Lut
from dkm_exporters.mlprogram.package import Package
from dkm_exporters.mlprogram.palettes import read_palettes
from dkm_models.bert import sentence_encoder
from dkm_runtimes.coreml_reference import CoreMLReferenceFp16Runtime, CoreMLReferenceRuntime
from tests import zoo
from tests.closeness import relative_l2
from tests.mlpackages import kinds, program, run, save
from tests.networks import BERT, FAMILIES, Family, Recurrent, ViT, mobile
from tests.zoo import lively

ct = pytest.importorskip("coremltools")
cto = pytest.importorskip("coremltools.optimize.coreml")
mil = pytest.importorskip("coremltools.converters.mil.mil")
mb, types = mil.Builder, mil.types

TARGETS = ("iOS15", "iOS16", "iOS17", "iOS18")
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2}


def image(size: int) -> tuple[Tensor, ...]:
    return (torch.randn(1, 3, size, size),)


def text() -> tuple[Tensor, ...]:
    mask = torch.ones(2, 8, dtype=torch.int32)
    mask[1, 5:] = 0
    return torch.randint(0, 64, (2, 8), dtype=torch.int32), mask


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(0, 20, (2, 7), dtype=torch.int32),)


def example(family: Family) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(spec.random(generator) for spec in family.inputs)


def convert(
    module: nn.Module,
    example: tuple[Tensor, ...],
    folder: Path,
    *,
    target: str = "iOS18",
    precision: str = "fp32",
    traced: bool = False,
    dynamic_shapes: Any = None,
    **settings: Any,
) -> Path:
    """What coremltools makes of a module."""
    precisions = {"fp32": ct.precision.FLOAT32, "fp16": ct.precision.FLOAT16}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program: Any
        if traced:
            program = torch.jit.trace(module, example)
        else:
            exported = torch.export.export(module, example, dynamic_shapes=dynamic_shapes)
            program = exported.run_decompositions()
        model = ct.convert(
            program,
            minimum_deployment_target=getattr(ct.target, target),
            compute_precision=precisions[precision],
            skip_model_load=True,
            **settings,
        )
    return save(model, folder)


def assert_same_outputs(
    module: nn.Module, inputs: tuple[Tensor, ...], artifact: Path, tolerance: float = 1e-5
) -> None:
    outputs = run(artifact, inputs)
    with torch.no_grad():
        expected = module(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for index, (ours, theirs) in enumerate(zip(outputs, expected, strict=True)):
        assert ours.shape == theirs.shape, index
        assert relative_l2(ours, theirs) <= tolerance, index


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "target", "precision"),
    [
        pytest.param(
            name,
            target,
            precision,
            marks=[pytest.mark.slow]
            if family.slow or (target, precision) not in (("iOS15", "fp32"), ("iOS18", "fp16"))
            else [],
        )
        for name, family in FAMILIES.items()
        for target in TARGETS
        for precision in TOLERANCE
    ],
)
def test_networks(name: str, target: str, precision: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    module, inputs = family.make(), example(family)
    artifact = convert(module, inputs, tmp_path, target=target, precision=precision)
    assert_same_outputs(module, inputs, artifact, TOLERANCE[precision])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("target", ["iOS15", "iOS18"])
def test_lstm_operator(target: str, bidirectional: bool, tmp_path: Path) -> None:
    layer = nn.LSTM(12, 8, num_layers=2, batch_first=True, bidirectional=bidirectional)
    module, inputs = lively(Recurrent(layer)), tokens()
    taken = [ct.TensorType(shape=inputs[0].shape, dtype=np.int32)]
    artifact = convert(module, inputs, tmp_path, target=target, traced=True, inputs=taken)
    assert kinds(artifact).count("lstm") == 2
    assert_same_outputs(module, inputs, artifact)


PALETTES: dict[str, dict[str, Any]] = {
    "scalar": {"nbits": 4},
    "groups": {"nbits": 3, "granularity": "per_grouped_channel", "group_size": 4},
    "vectors": {"nbits": 4, "cluster_dim": 2},
    "channel scales": {"nbits": 4, "enable_per_channel_scale": True},
}


def palettize(model: Any, settings: Mapping[str, Any], **more: Any) -> Any:
    config = cto.OpPalettizerConfig(
        mode="kmeans", weight_threshold=1, num_kmeans_workers=1, **settings
    )
    return cto.palettize_weights(model, cto.OptimizationConfig(global_config=config), **more)


def quantize(model: Any, **settings: Any) -> Any:
    more = {"joint_compression": settings.pop("joint_compression", False)}
    config = cto.OpLinearQuantizerConfig(weight_threshold=1, **settings)
    return cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=config), **more)


def prune(model: Any) -> Any:
    config = cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=1)
    return cto.prune_weights(model, cto.OptimizationConfig(global_config=config))


COMPRESSED: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    # target, an operator that must be in it, and how coremltools compresses
    "iOS16 palettes": (
        "iOS16",
        "constexpr_lut_to_dense",
        lambda model: palettize(model, PALETTES["scalar"]),
    ),
    "iOS16 int8": (
        "iOS16",
        "constexpr_affine_dequantize",
        lambda model: quantize(model, mode="linear", dtype="int8"),
    ),
    "iOS16 sparse": ("iOS16", "constexpr_sparse_to_dense", prune),
    **{
        f"iOS18 {name}": (
            "iOS18",
            "constexpr_lut_to_dense",
            partial(palettize, settings=settings),
        )
        for name, settings in PALETTES.items()
    },
    "iOS18 int8 LUT": (
        "iOS18",
        "constexpr_blockwise_shift_scale",
        lambda model: quantize(
            palettize(model, PALETTES["scalar"]), granularity="per_tensor", joint_compression=True
        ),
    ),
    "iOS18 int4 blocks": (
        "iOS18",
        "constexpr_blockwise_shift_scale",
        lambda model: quantize(
            model, mode="linear", dtype="int4", granularity="per_block", block_size=4
        ),
    ),
    "iOS18 uint4": (
        "iOS18",
        "constexpr_blockwise_shift_scale",
        lambda model: quantize(model, mode="linear", dtype="uint4"),
    ),
    "iOS18 sparse": ("iOS18", "constexpr_sparse_to_dense", prune),
    "iOS18 sparse palettes": (
        "iOS18",
        "constexpr_lut_to_sparse",
        lambda model: palettize(prune(model), PALETTES["scalar"], joint_compression=True),
    ),
    "iOS18 sparse int8": (
        "iOS18",
        "constexpr_sparse_blockwise_shift_scale",
        lambda model: quantize(prune(model), joint_compression=True),
    ),
}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("unet", "fp16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("unet", "fp32"), ("distilbert", "fp16"), ("distilbert", "fp32"))
        ),
    ],
)
def test_weights_that_coremltools_compressed(name: str, precision: str, tmp_path: Path) -> None:
    """The interpreter decodes them as coremltools itself does."""
    module, inputs = FAMILIES[name].make(), example(FAMILIES[name])
    dense = {}
    for target in ("iOS16", "iOS18"):
        (tmp_path / target).mkdir()
        path = convert(module, inputs, tmp_path / target, target=target, precision=precision)
        dense[target] = ct.models.MLModel(str(path), skip_model_load=True)
    for case, (target, operator, compress) in COMPRESSED.items():
        folder = tmp_path / case
        (folder / "decoded").mkdir(parents=True)
        model = compress(dense[target])
        artifact = save(model, folder)
        assert operator in kinds(artifact), case
        decoded = save(cto.decompress_weights(model), folder / "decoded")
        assert not any(kind.startswith("constexpr") for kind in kinds(decoded)), case
        for ours, theirs in zip(run(artifact, inputs), run(decoded, inputs), strict=True):
            assert relative_l2(ours, torch.from_numpy(theirs)) <= 1e-6, case


def test_scaled_channels_are_the_scale_of_their_palette(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    table = generator.integers(-128, 128, (1, 1, 16, 1), dtype=np.int8)
    indices = generator.integers(0, 16, (8, 6)).astype(types.np_uint4_dtype)
    scale, x = generator.random((8, 1), np.float32), torch.randn(1, 6)

    def build(x: Any) -> Any:
        raw = mb.constexpr_lut_to_dense(indices=indices, lut=table, name="weight")
        return mb.linear(x=x, weight=mb.constexpr_blockwise_shift_scale(data=raw, scale=scale))

    artifact = program(build, (x,), tmp_path)
    (palette,) = read_palettes(Package(artifact)).values()
    assert np.array_equal(palette.dense(), table.reshape(-1)[indices.astype(np.uint8)] * scale)
    (y,) = run(artifact, (x,))
    assert relative_l2(y, x @ torch.from_numpy(palette.dense()).T) <= 1e-6


def test_quantized_tables_of_either_order(tmp_path: Path) -> None:
    """An int8 LUT is scaled before its indices are looked up, or after."""
    generator = np.random.default_rng(0)
    table = generator.integers(-128, 128, (4, 1, 16, 2), dtype=np.int8)
    scale = np.exp2(generator.integers(-9, -5, (4, 1, 1, 1))).astype(np.float32)
    indices = generator.integers(0, 16, (8, 6)).astype(types.np_uint4_dtype)
    x = torch.randn(1, 6)

    def before(x: Any) -> Any:
        lut = mb.constexpr_blockwise_shift_scale(data=table, scale=scale)
        weight = mb.constexpr_lut_to_dense(
            indices=indices, lut=lut, vector_axis=np.int32(0), name="weight"
        )
        return mb.linear(x=x, weight=weight)

    def after(x: Any) -> Any:
        raw = mb.constexpr_lut_to_dense(
            indices=indices, lut=table, vector_axis=np.int32(0), name="weight"
        )
        return mb.linear(
            x=x, weight=mb.constexpr_blockwise_shift_scale(data=raw, scale=scale[:, :, 0, 0])
        )

    expected = Lut(table * scale, indices.astype(np.uint8), 0).dense()
    for build in (before, after):
        folder = tmp_path / build.__name__
        folder.mkdir()
        artifact = program(build, (x,), folder)
        (y,) = run(artifact, (x,))
        assert relative_l2(y, x @ torch.from_numpy(expected).T) <= 1e-6
    with pytest.raises(Unsupported, match="a palette with a scale per block is not known"):
        read_palettes(Package(tmp_path / "after" / "theirs.mlpackage"))
    (palette,) = read_palettes(Package(tmp_path / "before" / "theirs.mlpackage")).values()
    assert (palette.bits, palette.layout.dim, palette.layout.groups) == (4, 2, 4)
    assert np.array_equal(palette.lut, (table * scale).astype(np.float16).reshape(4, 16, 2))
    assert np.array_equal(palette.dense(), expected)


def test_a_scaled_table_beyond_float16_is_no_palette(tmp_path: Path) -> None:
    table = np.arange(16, dtype=np.int8).reshape(1, 1, 16, 1)
    x = torch.randn(1, 6)

    def build(x: Any) -> Any:
        lut = mb.constexpr_blockwise_shift_scale(
            data=table, scale=np.full((1, 1, 1, 1), 1 / 3, np.float32)
        )
        indices = np.zeros((8, 6), types.np_uint4_dtype)
        weight = mb.constexpr_lut_to_dense(indices=indices, lut=lut, name="weight")
        return mb.linear(x=x, weight=weight)

    with pytest.raises(Unsupported, match=r"weight.*: its LUT is not representable in float16"):
        read_palettes(Package(program(build, (x,), tmp_path)))


class Flexible(nn.Module):
    """Reshapes by sizes that only the input knows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.conv(image))
        batch, channels, height, width = x.shape
        x = x.reshape(batch, 4, 2, height, width).transpose(1, 2)
        x = x.reshape(batch, channels, -1).softmax(-1).view(batch, channels, height, width)
        return torch.cat([x, x.flip(2)], 3) + torch.arange(height)[:, None]


SIZES = {
    "range": lambda: ct.Shape((1, 3, ct.RangeDim(4, 32, 8), ct.RangeDim(4, 32, 8))),
    "list": lambda: ct.EnumeratedShapes([(1, 3, 8, 8), (1, 3, 12, 10)]),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("target", ["iOS15", "iOS18"])
def test_flexible_shapes(target: str, sizes: str, tmp_path: Path) -> None:
    module = lively(Flexible())
    free = {
        2: torch.export.Dim("height", min=4, max=32),
        3: torch.export.Dim("width", min=4, max=32),
    }
    artifact = convert(
        module,
        image(8),
        tmp_path,
        target=target,
        dynamic_shapes=[free],
        inputs=[ct.TensorType("image", SIZES[sizes]())],
    )
    assert {"shape", "gather"} <= set(kinds(artifact))
    for height, width in ((8, 8), (12, 10)):
        assert_same_outputs(module, (torch.randn(1, 3, height, width),), artifact)
    with pytest.raises(InvalidInput, match=r"shape \[1, 4, 8, 8\], expected \[1, 3, \?, \?\]"):
        run(artifact, (torch.randn(1, 4, 8, 8),))


def test_flexible_lengths(tmp_path: Path) -> None:
    module = lively(sentence_encoder(BERT))
    length = torch.export.Dim("length", min=2, max=16)
    flexible = ct.RangeDim(2, 16, 8)
    artifact = convert(
        module,
        text(),
        tmp_path,
        target="iOS17",
        dynamic_shapes=[{1: length}, {1: length}],
        inputs=[
            ct.TensorType(name, (2, flexible), dtype=np.int32) for name in ("token_ids", "mask")
        ],
    )
    for size in (8, 5):
        assert_same_outputs(module, tuple(x[:, :size] for x in text()), artifact)


def test_images_are_tensors_of_pixels(tmp_path: Path) -> None:
    """Scale and bias of an image input are operations of the program."""
    module = lively(mobile(nn.ReLU6(), nn.Sigmoid()))
    pixels = ct.ImageType("image", (1, 3, 16, 16), scale=1 / 127.5, bias=[-1.0, -1.1, -0.9])
    artifact = convert(module, image(16), tmp_path, target="iOS16", inputs=[pixels])
    x = torch.randint(0, 256, (1, 3, 16, 16)).float()
    with torch.no_grad():
        expected = module(x / 127.5 + torch.tensor([-1.0, -1.1, -0.9])[:, None, None])
    (y,) = run(artifact, (x,))
    assert relative_l2(y, expected) <= 1e-5


@pytest.mark.parametrize("labels", [["cat", "dog", "bird"], [7, 8, 9]])
def test_classifiers_give_label_and_probabilities(
    labels: list[str] | list[int], tmp_path: Path
) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1))
    x = torch.randn(1, 4)
    artifact = convert(module, (x,), tmp_path, classifier_config=ct.ClassifierConfig(labels))
    label, probabilities = run(artifact, (x,))
    with torch.no_grad():
        expected = module(x)[0]
    assert label == labels[int(expected.argmax())]
    assert relative_l2(probabilities, expected) <= 1e-6


def test_float16_activations_differ_from_float16_weights(tmp_path: Path) -> None:
    module, inputs = lively(ViT()), image(32)
    artifact = convert(module, inputs, tmp_path, precision="fp16")
    with torch.no_grad():
        expected = module(*inputs)
    errors = [
        relative_l2(run(artifact, inputs, runtime)[0], expected)
        for runtime in (CoreMLReferenceRuntime(), CoreMLReferenceFp16Runtime())
    ]
    assert 0 < errors[0] < errors[1] < 1e-2


def test_float16_overflows_are_seen(tmp_path: Path) -> None:
    """The squares exceed 65504, though their root does not."""
    module = nn.Sequential(nn.Linear(4, 4), Root())
    x = torch.full((1, 4), 400.0)
    artifact = convert(module, (x,), tmp_path, precision="fp16")
    assert np.isfinite(run(artifact, (x,))[0]).all()
    assert np.isinf(run(artifact, (x,), CoreMLReferenceFp16Runtime())[0]).any()


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * x).sum(-1).sqrt()


def test_float32_programs_have_nothing_to_round(tmp_path: Path) -> None:
    """That is no pass of the second mode, and no failure of the check."""
    model = zoo.palettize("tests.zoo:tokens", zoo.TOKENS, LayerRule(bits=4))
    save_checkpoint(model, tmp_path / "model.dkm.safetensors")
    settings = {"coreml": {"precision": "fp32"}}
    export(tmp_path / "model.dkm.safetensors", ["coreml"], tmp_path / "out", settings=settings)
    report = check(tmp_path / "out", runtimes=["coreml-reference", "coreml-reference-fp16"])
    assert [run.status for run in report.runtimes] == [Status.PASS, Status.NOT_RUN]
    (finding,) = report.runtimes[1].findings
    assert "the program is float32, so nothing would be rounded" in finding.message
    assert report.exit_code is ExitCode.OK


def test_unknown_operators_are_named_with_their_place(tmp_path: Path) -> None:
    """Also those with blocks of operations inside, such as coremltools' GRU."""
    module, inputs = FAMILIES["gru"].make(), tokens()
    taken = [ct.TensorType(shape=inputs[0].shape, dtype=np.int32)]
    artifact = convert(module, inputs, tmp_path, traced=True, inputs=taken)
    message = (
        r"operator 'while_loop' of '\w+', operation \d+ of \d+ in function 'main', is not known"
    )
    with pytest.raises(Unsupported, match=message):
        CoreMLReferenceRuntime().load(artifact)
    assert read_palettes(Package(artifact)) == {}
