"""The reference runtime on single operators, as coremltools writes them: they are PyTorch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dkm_exporters.mlprogram.package import Package
from dkm_runtimes.coreml_reference import CoreMLReferenceFp16Runtime
from tests.closeness import relative_l2
from tests.mlpackages import edit_model, operations, program, run
from tests.zoo import lively

mil = pytest.importorskip("coremltools.converters.mil.mil")
mb, types = mil.Builder, mil.types


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_operators_that_take_no_layer(tmp_path: Path) -> None:
    """What networks elsewhere do not have, in the oldest version that has it."""
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
