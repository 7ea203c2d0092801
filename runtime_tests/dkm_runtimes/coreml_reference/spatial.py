"""MIL operators with a batch, a channel and one to three spatial axes."""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from dkm_runtimes.coreml_reference.operators import Operator, Scalar, ints

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


def _per_axis(values: Tensor | None, x: Tensor) -> list[int]:
    """A number for each spatial axis, 1 by default."""
    return [1] * (x.dim() - 2) if values is None else ints(values)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Scalar = 1,
) -> Tensor:
    steps, spread = _per_axis(strides, x), _per_axis(dilations, x)
    pairs = _padding(pad_type, pad, list(x.shape[2:]), steps, _extent(weight, spread))
    convolve = _CONV[x.dim() - 2]
    return convolve(_padded(x, pairs), weight, bias, steps, 0, spread, int(groups))


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Tensor | None = None,
    output_shape: Tensor | None = None,
    pad_type: str = "valid",
    strides: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Scalar = 1,
) -> Tensor:
    steps = _per_axis(strides, x)
    convolve = _CONV_TRANSPOSE[x.dim() - 2]
    y = convolve(x, weight, None, steps, 0, 0, int(groups), _per_axis(dilations, x))
    full = list(y.shape[2:])
    sizes = None if output_shape is None else ints(output_shape)[2:]
    if pad_type == "same":
        sizes = sizes or [size * step for size, step in zip(x.shape[2:], steps, strict=True)]
        totals = [size - wanted for size, wanted in zip(full, sizes, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = _padding(pad_type, pad, full, [], [])
        if sizes is not None:  # what is left over, or missing, is at the end
            pairs = [
                (begin, size - begin - wanted)
                for (begin, _), size, wanted in zip(pairs, full, sizes, strict=True)
            ]
    y = _padded(y, [(-begin, -end) for begin, end in pairs])
    return y if bias is None else y + bias.reshape(-1, *[1] * len(full))


def _max_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    pad_type: str = "valid",
    strides: Tensor | None = None,
    pad: Tensor | None = None,
    ceil_mode: Scalar = False,
) -> Tensor:
    kernel, steps = ints(kernel_sizes), _per_axis(strides, x)
    pairs = _padding(pad_type, pad, list(x.shape[2:]), steps, kernel)
    pool = _MAX_POOL[x.dim() - 2]
    if ceil_mode:
        # MIL has it only with equal padding on both sides.
        return pool(x, kernel, steps, [begin for begin, _ in pairs], ceil_mode=True)
    return pool(_padded(x, pairs, float("-inf")), kernel, steps)


def _avg_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    pad_type: str = "valid",
    strides: Tensor | None = None,
    pad: Tensor | None = None,
    ceil_mode: Scalar = False,
    exclude_padding_from_average: Scalar = False,
) -> Tensor:
    kernel, steps = ints(kernel_sizes), _per_axis(strides, x)
    pairs = _padding(pad_type, pad, list(x.shape[2:]), steps, kernel)
    pool = _AVG_POOL[x.dim() - 2]
    if ceil_mode:
        counted = not exclude_padding_from_average
        return pool(x, kernel, steps, [begin for begin, _ in pairs], True, counted)
    average = pool(_padded(x, pairs), kernel, steps)
    if exclude_padding_from_average:
        average = average / pool(_padded(x.new_ones(x.shape), pairs), kernel, steps)
    return average


def _l2_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    pad_type: str = "valid",
    strides: Tensor | None = None,
    pad: Tensor | None = None,
    ceil_mode: Scalar = False,
) -> Tensor:
    """The root of the sum of the squares, of which there is a fixed number, padding included."""
    mean = _avg_pool(x.square(), kernel_sizes, pad_type, strides, pad, ceil_mode)
    return (mean * math.prod(ints(kernel_sizes))).sqrt()


def _points(size: int, wanted: int, mode: str) -> Tensor:
    """Where along an axis of ``size`` the samples of a resized one lie, in float64."""
    index = torch.arange(wanted, dtype=torch.float64)
    if mode == "STRICT_ALIGN_CORNERS" or (mode == "ALIGN_CORNERS" and wanted > 1):
        points = index * ((size - 1) / max(wanted - 1, 1))
    elif mode == "ALIGN_CORNERS":
        points = index + (size - 1) / 2
    elif mode == "DEFAULT":
        points = index * (size / wanted)
    elif mode == "OFFSET_CORNERS":
        points = (index + 0.5) * (max(1, size - 1) / wanted)
    elif mode == "UNALIGN_CORNERS":
        points = (index + 0.5) * (size / wanted) - 0.5
    else:
        raise NotImplementedError(f"sampling mode {mode}")
    return points.clamp(0, size - 1)


def _linear(x: Tensor, axis: int, wanted: int, mode: str) -> Tensor:
    """Resize one axis by interpolation."""
    points = _points(x.shape[axis], wanted, mode)
    low = points.to(torch.int64)
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    share = (points - low).to(x.dtype).reshape(-1, *[1] * (-1 - axis))
    return torch.lerp(x.index_select(axis, low), x.index_select(axis, high), share)


def _nearest(x: Tensor, axis: int, wanted: int) -> Tensor:
    """Resize one axis by repeating, or leaving out, values."""
    places = torch.arange(wanted) * x.shape[axis] // wanted
    return x.index_select(axis, places)


def _scaled(x: Tensor, height: Scalar, width: Scalar) -> tuple[int, int]:
    """The sizes that factors lead to."""
    return int(x.shape[-2] * float(height)), int(x.shape[-1] * float(width))


def _upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: Scalar = 1, scale_factor_width: Scalar = 1
) -> Tensor:
    height, width = _scaled(x, scale_factor_height, scale_factor_width)
    return _nearest(_nearest(x, -2, height), -1, width)


def _resize_nearest_neighbor(
    x: Tensor, target_size_height: Tensor, target_size_width: Tensor
) -> Tensor:
    return _nearest(_nearest(x, -2, int(target_size_height)), -1, int(target_size_width))


def _upsample_bilinear(
    x: Tensor,
    scale_factor_height: Scalar = 1,
    scale_factor_width: Scalar = 1,
    align_corners: Scalar = True,
    half_pixel_centers: Scalar | None = None,
) -> Tensor:
    height, width = _scaled(x, scale_factor_height, scale_factor_width)
    centers = not align_corners if half_pixel_centers is None else bool(half_pixel_centers)
    if align_corners and centers:
        raise NotImplementedError("align_corners with half_pixel_centers")
    mode = "UNALIGN_CORNERS" if centers else "DEFAULT"
    mode = "STRICT_ALIGN_CORNERS" if align_corners else mode
    return _linear(_linear(x, -2, height, mode), -1, width, mode)


def _resize_bilinear(
    x: Tensor,
    target_size_height: Scalar = 1,
    target_size_width: Scalar = 1,
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    rows = _linear(x, -2, int(target_size_height), sampling_mode)
    return _linear(rows, -1, int(target_size_width), sampling_mode)


def _resize(
    x: Tensor,
    shape: Tensor,
    resized_dims: Tensor,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    sizes = ints(shape)
    for axis in range(-int(resized_dims), 0):
        wanted = sizes[axis] or x.shape[axis]
        if interpolation_mode == "LINEAR":
            x = _linear(x, axis, wanted, sampling_mode)
        elif (interpolation_mode, sampling_mode) == ("NEAREST_NEIGHBOR", "DEFAULT"):
            x = _nearest(x, axis, wanted)
        else:
            raise NotImplementedError(f"{interpolation_mode} with sampling mode {sampling_mode}")
    return x


TABLE: dict[str, Operator] = {
    "avg_pool": _avg_pool,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "l2_pool": _l2_pool,
    "max_pool": _max_pool,
    "resize": _resize,
    "resize_bilinear": _resize_bilinear,
    "resize_nearest_neighbor": _resize_nearest_neighbor,
    "upsample_bilinear": _upsample_bilinear,
    "upsample_nearest_neighbor": _upsample_nearest_neighbor,
}
