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
import numpy.typing as npt
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
from tests.mlpackages import edit_model, kinds, operations, program, run, save
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


def relative_l2(actual: npt.NDArray[Any], expected: Tensor) -> float:
    reference = expected.double().numpy()
    return float(np.linalg.norm(actual - reference) / np.linalg.norm(reference))


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


def test_gru_operator(tmp_path: Path) -> None:
    """With ``reset_after`` it is torch's; torch's gates are reset, update, output."""
    layer = lively(nn.GRU(6, 4))
    own = {
        name: torch.cat([value.chunk(3)[gate] for gate in (0, 2, 1)]).detach().numpy()
        for name, value in layer.named_parameters()
    }
    x, h = torch.randn(5, 2, 6), torch.randn(2, 4)

    def gru(x: Any, h: Any) -> Any:
        return mb.gru(
            x=x,
            initial_h=h,
            weight_ih=own["weight_ih_l0"],
            weight_hh=own["weight_hh_l0"],
            input_bias=own["bias_ih_l0"],
            bias=own["bias_hh_l0"],
            reset_after=True,
            output_sequence=True,
        )

    sequence, last = run(program(gru, (x, h), tmp_path), (x, h))
    with torch.no_grad():
        expected, _ = layer(x, h[None])
    assert relative_l2(sequence, expected) <= 1e-6
    assert relative_l2(last, expected[-1]) <= 1e-6


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gru_resets_the_state_by_default(direction: str, tmp_path: Path) -> None:
    """Against the NumPy reference of coremltools' own test, which runs on Apple's systems."""
    weights = [torch.randn(3, 4, size) for size in (6, 4)]
    bias, x, h = torch.randn(3, 4), torch.randn(5, 2, 6), torch.randn(2, 4)

    def gru(x: Any, h: Any) -> Any:
        return mb.gru(
            x=x,
            initial_h=h,
            weight_ih=weights[0].reshape(12, 6).numpy(),
            weight_hh=weights[1].reshape(12, 4).numpy(),
            bias=bias.reshape(-1).numpy(),
            direction=direction,
        )

    _, last = run(program(gru, (x, h), tmp_path, "iOS15"), (x, h))
    (w_r, w_o, w_z), (r_r, r_o, r_z) = weights
    state = h
    for step in x if direction == "forward" else x.flip(0):
        z = torch.sigmoid(step @ w_z.T + state @ r_z.T + bias[2])
        r = torch.sigmoid(step @ w_r.T + state @ r_r.T + bias[0])
        o = torch.tanh(step @ w_o.T + (state * r) @ r_o.T + bias[1])
        state = (1 - z) * o + z * state
    assert relative_l2(last, state) <= 1e-6


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


def test_operators_that_take_no_layer(tmp_path: Path) -> None:
    """What the networks above do not have, in the oldest version that has it."""
    x, y = torch.randn(2, 6, 4, 4), torch.rand(2, 3, 5) * 0.8 + 0.1
    index = torch.tensor([[[1, 0, 2, 2, 1]], [[0, 0, 1, 2, 1]]], dtype=torch.int32)

    def operators(x: Any, y: Any, index: Any) -> Any:
        ones = np.ones((1, 1), np.int32)
        return (
            *mb.topk(x=y, k=3, axis=2),
            mb.argsort(x=y, axis=1, ascending=True),
            mb.one_hot(indices=index, one_hot_vector_size=4, on_value=2.0, off_value=-1.0),
            mb.gather_along_axis(x=y, indices=index, axis=1),
            mb.gather(x=y, indices=np.array([[2, 0], [1, -1]], np.int32), axis=1),
            mb.gather_nd(x=y, indices=np.array([[1, 2], [0, -1]], np.int32)),
            mb.scatter(
                data=y,
                indices=np.array([3, 0], np.int32),
                updates=mb.slice_by_size(x=y, begin=[0, 0, 1], size=[-1, -1, 2]),
                axis=2,
                mode="update",
            ),
            mb.scatter_nd(
                data=y,
                indices=ones,
                updates=mb.slice_by_size(x=y, begin=[0, 0, 0], size=[1, 3, 5]),
                mode="add",
            ),
            mb.non_zero(x=mb.cast(x=mb.greater(x=y, y=0.5), dtype="fp32")),
            mb.cumsum(x=y, axis=2, exclusive=True, reverse=True),
            mb.pad(x=x, pad=[1, 2, 2, 1], mode="replicate"),
            mb.concat(values=(y, mb.exp2(x=y)), axis=1, interleave=True),
            mb.split(x=y, split_sizes=[2, 3], axis=2)[1],
            mb.depth_to_space(x=mb.space_to_depth(x=x, block_size=2), block_size=2),
            mb.flatten2d(x=x, axis=2),
            mb.reshape(x=x, shape=[0, 3, 2, -1]),
            mb.range_1d(start=1, end=8, step=3),
            mb.fill(shape=mb.shape(x=y), value=2.0),
            mb.resize_bilinear(
                x=x, target_size_height=7, target_size_width=9, sampling_mode="UNALIGN_CORNERS"
            ),
            mb.resize_bilinear(
                x=x, target_size_height=7, target_size_width=9, sampling_mode="STRICT_ALIGN_CORNERS"
            ),
            mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3),
            mb.resize_nearest_neighbor(x=x, target_size_height=6, target_size_width=3),
            mb.l2_pool(x=x, kernel_sizes=[2, 3], strides=[1, 1], pad_type="valid"),
            mb.local_response_norm(x=x, size=3),
            mb.conv_transpose(
                x=x,
                weight=np.full((6, 1, 3, 3), 0.1, np.float32),
                strides=[2, 2],
                pad_type="custom",
                pad=[1, 1, 1, 1],
                output_shape=[2, 1, 8, 8],
            ),
            mb.reduce_log_sum_exp(x=y, axes=[1, 2]),
            mb.reduce_prod(x=y, axes=[0, 2], keep_dims=True),
            mb.reduce_l1_norm(x=y),
            mb.reduce_sum_square(x=y, axes=[1]),
            mb.reduce_argmin(x=y, axis=1),
            mb.acos(x=y),
            mb.asin(x=y),
            mb.atan(x=y),
            mb.atanh(x=y),
            mb.tan(x=y),
            mb.sinh(x=y),
            mb.cosh(x=y),
            mb.ceil(x=y),
            mb.round(x=y),
            mb.sign(x=x),
            mb.softsign(x=x),
            mb.clamped_relu(x=x, alpha=0.1, beta=0.5),
            mb.linear_activation(x=x, alpha=2.0, beta=1.0),
            mb.scaled_tanh(x=x, alpha=2.0, beta=0.5),
            mb.threshold(x=x, alpha=0.2),
        )

    places = torch.tensor([[2, 0], [1, 2]])
    updated = y.clone()
    updated[:, :, [3, 0]] = y[:, :, 1:3]
    added = y.clone()
    added[1] += y[0]
    weight = torch.full((6, 1, 3, 3), 0.1)
    with torch.no_grad():
        expected = [
            *y.topk(3),
            y.argsort(1),
            F.one_hot(index.long(), 4) * 3.0 - 1,
            y.gather(1, index.long()),
            y[:, places],
            torch.stack([y[1, 2], y[0, 2]]),
            updated,
            added,
            (y > 0.5).nonzero(),
            y.flip(2).cumsum(2).flip(2) - y,
            F.pad(x, (2, 1, 1, 2), mode="replicate"),
            torch.stack([y, y.exp2()], 2).flatten(1, 2),
            y[:, :, 2:],
            x,
            x.flatten(2).flatten(0, 1),
            x.reshape(2, 3, 2, 16),
            torch.tensor([1, 4, 7]),
            torch.full((2, 3, 5), 2.0),
            F.interpolate(x, (7, 9), mode="bilinear"),
            F.interpolate(x, (7, 9), mode="bilinear", align_corners=True),
            F.interpolate(x, (8, 12), mode="bilinear", align_corners=True),
            F.interpolate(x, (6, 3), mode="nearest"),
            F.lp_pool2d(x, 2.0, (2, 3), (1, 1)),
            F.local_response_norm(x, 3),
            F.conv_transpose2d(x, weight, stride=2, padding=1, output_padding=1),
            y.logsumexp((1, 2)),
            y.prod(0, keepdim=True).prod(2, keepdim=True),
            y.abs().sum(),
            y.square().sum(1),
            y.argmin(1),
            *(f(y) for f in (torch.acos, torch.asin, torch.atan, torch.atanh, torch.tan)),
            *(f(y) for f in (torch.sinh, torch.cosh, torch.ceil, torch.round)),
            x.sign(),
            F.softsign(x),
            F.leaky_relu(x, 0.1).clamp(max=0.5),
            2 * x + 1,
            2 * torch.tanh(0.5 * x),
            x.clamp(min=0.2),
        ]
    artifact = program(operators, (x, y, index), tmp_path, "iOS15")
    outputs = run(artifact, (x, y, index))
    names = [operation.kind for operation in Package(artifact).operations]
    for place, (ours, theirs) in enumerate(zip(outputs, expected, strict=True)):
        assert ours.shape == theirs.shape, (place, names)
        assert relative_l2(ours, theirs) <= 1e-6, (place, names)


def test_left_out_parameters_have_the_defaults_of_their_operator(tmp_path: Path) -> None:
    x, index = torch.rand(1, 4, 6, 6) + 0.1, torch.zeros(2, dtype=torch.int32)
    weight = torch.randn(4, 4, 3, 3).numpy()

    def build(x: Any, index: Any) -> Any:
        return (
            mb.conv(x=x, weight=weight),
            mb.conv_transpose(x=x, weight=weight),
            mb.max_pool(x=x, kernel_sizes=[2, 2], pad_type="valid"),
            mb.avg_pool(x=x, kernel_sizes=[2, 2], pad_type="valid"),
            mb.gather(x=x, indices=index),
            mb.softmax(x=x),
            mb.layer_norm(x=x, axes=[0, 1, 2, 3]),
            mb.l2_norm(x=x),
            mb.batch_norm(x=x, mean=np.ones(4, np.float32), variance=np.ones(4, np.float32)),
            mb.instance_norm(x=x),
            mb.reduce_sum(x=x),
            mb.reduce_argmax(x=x),
            mb.inverse(x=x),
            mb.log(x=x),
            mb.rsqrt(x=x),
            mb.matmul(x=x, y=x),
            mb.cumsum(x=x),
            mb.concat(values=(x, x), axis=1),
            mb.pad(x=x, pad=[1, 1]),
            mb.band_part(x=x, lower=1),
            mb.topk(x=x)[0],
            mb.gelu(x=x),
            mb.upsample_bilinear(x=x, scale_factor_width=2),
            mb.slice_by_index(x=x, begin=[0, 1, 0, 0], end=[1, 3, 6, 2]),
        )

    artifact = program(build, (x, index), tmp_path)
    complete = run(artifact, (x, index))
    required = {"x", "y", "weight", "kernel_sizes", "indices", "mean", "variance", "values", "pad"}
    required |= {"lower", "begin", "end", "scale_factor_width", "pad_type"}

    def strip(spec: Any) -> None:
        for operation in operations(spec):
            for name in set(operation.inputs) - required:
                if (operation.type, name) != ("concat", "axis"):
                    del operation.inputs[name]

    edit_model(artifact, strip)
    given = {name for op in Package(artifact).operations for name in op.arguments}
    assert given == {*required, "axis", "val"}
    for ours, theirs in zip(run(artifact, (x, index)), complete, strict=True):
        assert np.array_equal(ours, theirs)


def test_results_are_rounded_to_float16_where_the_program_says_so(tmp_path: Path) -> None:
    """And to nothing else: float32 operations and inputs stay as they are."""
    x, y = torch.randn(3, 5) * 10, torch.randn(3, 5)

    def build(x: Any, y: Any) -> Any:
        half = mb.mul(x=mb.cast(x=x, dtype="fp16"), y=mb.cast(x=y, dtype="fp16"))
        half = mb.add(x=half, y=np.float16(0.1))
        return mb.mul(x=mb.cast(x=half, dtype="fp32"), y=np.float32(1 / 3)), mb.add(x=x, y=y)

    artifact = program(build, (x, y), tmp_path)
    rounded, unrounded = run(artifact, (x, y), CoreMLReferenceFp16Runtime())
    half = x.half().numpy() * y.half().numpy() + np.float16(0.1)
    assert np.array_equal(rounded, half.astype(np.float32) * np.float32(1 / 3))
    assert np.array_equal(unrounded, (x + y).numpy())
    exact = x.numpy() * y.numpy() + np.float32(np.float16(0.1))
    plain, _ = run(artifact, (x, y))
    assert relative_l2(plain, torch.from_numpy(exact / 3)) <= 1e-6
    assert not np.array_equal(plain, rounded)


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


def test_operators_of_later_versions(tmp_path: Path) -> None:
    x, y = torch.randn(2, 4, 6, 6), torch.randn(2, 3, 5)
    index = torch.tensor([[2, 0], [1, 1]], dtype=torch.int32)

    def operators(x: Any, y: Any, index: Any) -> Any:
        scale, zero = np.array([0.1, 0.2, 0.3], np.float32), np.array([3, 0, -5], np.int8)
        steps = mb.quantize(input=y, scale=scale, zero_point=zero, axis=1, output_dtype="int8")
        return (
            mb.dequantize(input=steps, scale=scale, zero_point=zero, axis=1),
            mb.gather(x=y, indices=index, axis=2, batch_dims=1),
            mb.gather_nd(x=y, indices=index, batch_dims=1),
            mb.scatter_along_axis(
                data=mb.fill_like(ref_tensor=y, value=1.0),
                indices=np.full((2, 3, 2), 4, np.int32),
                updates=np.ones((2, 3, 2), np.float32),
                axis=2,
            ),
            mb.reshape(x=x, shape=[3, -1, 0]),
            mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
            mb.crop(x=x, crop_height=[1, 2], crop_width=[0, 1]),
            mb.resize(
                x=x, shape=[9, 0], resized_dims=np.uint32(2), sampling_mode="UNALIGN_CORNERS"
            ),
            mb.resize(
                x=x, shape=[3, 12], resized_dims=np.uint32(2), interpolation_mode="NEAREST_NEIGHBOR"
            ),
            mb.upsample_bilinear(
                x=x, scale_factor_width=2, align_corners=False, half_pixel_centers=True
            ),
            mb.slice_update(
                x=y, update=np.zeros((2, 2, 5), np.float32), begin=[0, 1, 0], end=[2, 3, 5]
            ),
            mb.topk(x=y, k=2, axis=2, ascending=True, output_indices_dtype="uint16")[1],
        )

    steps = torch.tensor([0.1, 0.2, 0.3])[:, None]
    zero = torch.tensor([3, 0, -5])[:, None]
    updated = y.clone()
    updated[:, 1:3] = 0
    added = torch.ones(2, 3, 5)
    added[:, :, 4] = 3
    expected = [
        ((y / steps).round() + zero).clamp(-128, 127).sub(zero) * steps,
        torch.stack([y[0][:, index[0]], y[1][:, index[1]]]),
        torch.stack([y[0, 2, 0], y[1, 1, 1]]),
        added,
        x.reshape(3, -1, 6),
        F.pixel_unshuffle(x, 2),
        x[:, :, 1:4, :5],
        F.interpolate(x, (9, 6), mode="bilinear"),
        F.interpolate(x, (3, 12), mode="nearest"),
        F.interpolate(x, (6, 12), mode="bilinear"),
        updated,
        y.topk(2, largest=False).indices,
    ]
    artifact = program(operators, (x, y, index), tmp_path)
    for place, (ours, theirs) in enumerate(
        zip(run(artifact, (x, y, index)), expected, strict=True)
    ):
        assert ours.shape == theirs.shape, place
        assert relative_l2(ours, theirs) <= 1e-6, place
