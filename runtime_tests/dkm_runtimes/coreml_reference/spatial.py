"""MIL operators with a batch, a channel and one to three spatial axes."""

from __future__ import annotations

from typing import Final

import torch.nn.functional as F
from torch import Tensor

from dkm_runtimes.coreml_reference.operators import Operator, ints

_CONV: Final = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: Final = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL: Final = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: Final = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}

Pairs = list[tuple[int, int]]
"""Padding before and after each spatial axis."""


def _padding(
    pad_type: str, pad: Tensor | None, sizes: list[int], strides: list[int], kernel: list[int]
) -> Pairs:
    if pad_type in ("same", "same_lower"):
        # As many outputs as strides fit; an odd element goes to the end, or to the beginning.
        totals = [
            max((-(-size // stride) - 1) * stride + extent - size, 0)
            for size, stride, extent in zip(sizes, strides, kernel, strict=True)
        ]
        halves = [(total // 2, total - total // 2) for total in totals]
        return halves if pad_type == "same" else [(end, begin) for begin, end in halves]
    if pad_type == "custom" and pad is not None:
        given = ints(pad)
        return list(zip(given[::2], given[1::2], strict=True))
    return [(0, 0)] * len(sizes)


def _padded(x: Tensor, pairs: Pairs, value: float = 0.0) -> Tensor:
    return F.pad(x, [size for pair in reversed(pairs) for size in pair], value=value)


def _extent(weight: Tensor, dilations: list[int]) -> list[int]:
    return [
        dilation * (size - 1) + 1
        for size, dilation in zip(weight.shape[2:], dilations, strict=True)
    ]


def _conv(
    x: Tensor,
    weight: Tensor,
    strides: Tensor,
    pad_type: str,
    dilations: Tensor,
    groups: Tensor,
    pad: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    steps, spread = ints(strides), ints(dilations)
    pairs = _padding(pad_type, pad, list(x.shape[2:]), steps, _extent(weight, spread))
    convolve = _CONV[x.dim() - 2]
    return convolve(_padded(x, pairs), weight, bias, steps, 0, spread, int(groups))


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    strides: Tensor,
    pad_type: str,
    dilations: Tensor,
    groups: Tensor,
    pad: Tensor | None = None,
    bias: Tensor | None = None,
    output_shape: Tensor | None = None,
) -> Tensor:
    if pad_type not in ("valid", "custom"):
        raise ValueError(f"pad_type {pad_type} is not known")
    convolve = _CONV_TRANSPOSE[x.dim() - 2]
    y = convolve(x, weight, bias, ints(strides), 0, 0, int(groups), ints(dilations))
    pairs = _padding(pad_type, pad, list(x.shape[2:]), [], [])
    for axis, (begin, end) in enumerate(pairs, start=2):
        y = y.narrow(axis, begin, y.shape[axis] - begin - end)
    return y


def _max_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor,
    pad_type: str,
    ceil_mode: Tensor,
    pad: Tensor | None = None,
) -> Tensor:
    kernel, steps = ints(kernel_sizes), ints(strides)
    pairs = _padding(pad_type, pad, list(x.shape[2:]), steps, kernel)
    pool = _MAX_POOL[x.dim() - 2]
    if ceil_mode:
        # MIL has it only with equal padding on both sides.
        return pool(x, kernel, steps, [begin for begin, _ in pairs], ceil_mode=True)
    return pool(_padded(x, pairs, float("-inf")), kernel, steps)


def _avg_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor,
    pad_type: str,
    ceil_mode: Tensor,
    exclude_padding_from_average: Tensor,
    pad: Tensor | None = None,
) -> Tensor:
    kernel, steps = ints(kernel_sizes), ints(strides)
    pairs = _padding(pad_type, pad, list(x.shape[2:]), steps, kernel)
    pool = _AVG_POOL[x.dim() - 2]
    if ceil_mode:
        counted = not exclude_padding_from_average
        return pool(x, kernel, steps, [begin for begin, _ in pairs], True, counted)
    average = pool(_padded(x, pairs), kernel, steps)
    if exclude_padding_from_average:
        average = average / pool(_padded(x.new_ones(x.shape), pairs), kernel, steps)
    return average


def _upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: Tensor, scale_factor_width: Tensor
) -> Tensor:
    factors = (float(scale_factor_height), float(scale_factor_width))
    return F.interpolate(x, scale_factor=factors, mode="nearest")


def _upsample_bilinear(
    x: Tensor, scale_factor_height: Tensor, scale_factor_width: Tensor, align_corners: Tensor
) -> Tensor:
    factors = (float(scale_factor_height), float(scale_factor_width))
    return F.interpolate(
        x, scale_factor=factors, mode="bilinear", align_corners=bool(align_corners)
    )


def _crop(x: Tensor, crop_height: Tensor, crop_width: Tensor) -> Tensor:
    (top, bottom), (left, right) = ints(crop_height), ints(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


def _pixel_shuffle(x: Tensor, upscale_factor: Tensor) -> Tensor:
    return F.pixel_shuffle(x, int(upscale_factor))


TABLE: dict[str, Operator] = {
    "avg_pool": _avg_pool,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "crop": _crop,
    "max_pool": _max_pool,
    "pixel_shuffle": _pixel_shuffle,
    "upsample_bilinear": _upsample_bilinear,
    "upsample_nearest_neighbor": _upsample_nearest_neighbor,
}
