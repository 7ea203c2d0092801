"""MIL operators that move values without computing on them, and that make shapes and indices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dkm_runtimes.coreml_reference.bounds import MOST_NUMBERS, TooLarge
from dkm_runtimes.coreml_reference.operators import Operator, Scalar, integers, ints


def _shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int64)


def _reshape(x: Tensor, shape: Tensor) -> Tensor:
    """A 0 stands for the size of ``x`` at the same place from the right, or for 1 beyond it."""
    sizes = ints(shape)
    for place, size in enumerate(reversed(sizes), start=1):
        if size == 0:
            sizes[-place] = x.shape[-place] if place <= x.dim() else 1
    return x.reshape(sizes)


def _flatten2d(x: Tensor, axis: Scalar = 1) -> Tensor:
    rows = x.shape[: int(axis)].numel()
    return x.reshape(rows, x.numel() // rows)


def _transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(ints(perm))


def _expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    added = ints(axes)
    rank = x.dim() + len(added)
    for axis in sorted(index % rank for index in added):
        x = x.unsqueeze(axis)
    return x


def _squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(ints(axes))


def _concat(values: list[Tensor], axis: Tensor, interleave: Scalar = False) -> Tensor:
    along = int(axis)
    if interleave:
        along %= values[0].dim()
        return torch.stack(values, along + 1).flatten(along, along + 1)
    return torch.cat([value if value.dim() else value.reshape(1) for value in values], along)


def _stack(values: list[Tensor], axis: Tensor) -> Tensor:
    return torch.stack(values, int(axis))


def _split(
    x: Tensor,
    axis: Tensor,
    num_splits: Tensor | None = None,
    split_sizes: Tensor | None = None,
) -> list[Tensor]:
    if split_sizes is not None:
        return list(x.split(ints(split_sizes), int(axis)))
    if num_splits is None:
        raise ValueError("neither num_splits nor split_sizes is given")
    if num_splits > MOST_NUMBERS:
        raise TooLarge(f"more than {MOST_NUMBERS} parts")
    return list(x.tensor_split(int(num_splits), int(axis)))


def _tile(x: Tensor, reps: Tensor) -> Tensor:
    return x.repeat(ints(reps))


def _reverse(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.flip(list(range(x.dim())) if axes is None else ints(axes))


def _cumsum(
    x: Tensor, axis: Scalar = 0, exclusive: Scalar = False, reverse: Scalar = False
) -> Tensor:
    along = int(axis)
    ordered = x.flip(along) if reverse else x
    total = ordered.cumsum(along) - (ordered if exclusive else 0)
    return total.flip(along) if reverse else total


def _band_part(x: Tensor, lower: Scalar = -1, upper: Scalar = -1) -> Tensor:
    """Keep ``lower`` diagonals below the main one and ``upper`` above it; -1 keeps all."""
    x = x if lower < 0 else x.triu(-int(lower))
    return x if upper < 0 else x.tril(int(upper))


def _fill(shape: Tensor, value: Scalar = 0.0) -> Tensor:
    return torch.as_tensor(value).repeat(ints(shape))


def _fill_like(ref_tensor: Tensor, value: Scalar = 0.0) -> Tensor:
    return torch.as_tensor(value).repeat(ref_tensor.shape)


def _range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item())


def _one_hot(
    indices: Tensor,
    one_hot_vector_size: Tensor,
    axis: Scalar = -1,
    on_value: Scalar = 1,
    off_value: Scalar = 0,
) -> Tensor:
    places = torch.arange(int(one_hot_vector_size))
    hot = (indices.unsqueeze(-1) == places).movedim(-1, int(axis))
    return torch.where(hot, torch.as_tensor(on_value), torch.as_tensor(off_value))


def _non_zero(x: Tensor) -> Tensor:
    return x.nonzero()


def _argsort(x: Tensor, axis: Scalar = -1, ascending: Scalar = False) -> Tensor:
    return x.argsort(int(axis), descending=not ascending)


def _topk(
    x: Tensor,
    k: Scalar = 1,
    axis: Scalar = -1,
    ascending: Scalar = False,
    sort: Scalar = True,
    return_indices: Scalar = True,
    output_indices_dtype: str = "int32",
) -> list[Tensor]:
    along = int(axis)
    count = x.shape[along] if k == -1 else int(k)
    values, indices = x.topk(count, along, largest=not ascending)
    return [values, integers(indices, output_indices_dtype)] if return_indices else [values]


def _gather(
    x: Tensor,
    indices: Tensor,
    axis: Scalar = 0,
    batch_dims: Scalar = 0,
    validate_indices: Scalar = False,
) -> Tensor:
    along, batch = int(axis) % x.dim(), int(batch_dims)
    index = torch.where(indices < 0, indices + x.shape[along], indices)
    if not batch:
        taken = x.index_select(along, index.reshape(-1))
        return taken.reshape((*x.shape[:along], *indices.shape, *x.shape[along + 1 :]))
    front = x.movedim(along, batch)
    rows = front.reshape(-1, *front.shape[batch:])
    picked = rows[torch.arange(len(rows)).unsqueeze(1), index.reshape(len(rows), -1)]
    shape = (*indices.shape, *front.shape[batch + 1 :])
    count = indices.dim() - batch
    return picked.reshape(shape).movedim(
        list(range(batch, batch + count)), list(range(along, along + count))
    )


def _gather_along_axis(
    x: Tensor, indices: Tensor, axis: Scalar = 0, validate_indices: Scalar = False
) -> Tensor:
    along = int(axis)
    return x.gather(along, torch.where(indices < 0, indices + x.shape[along], indices))


def _coordinates(indices: Tensor, x: Tensor) -> list[Tensor]:
    """The last axis of ``indices`` as an index for each of the first axes of ``x``."""
    if indices.shape[-1] > x.dim():
        raise ValueError(f"{indices.shape[-1]} indices for {x.dim()} axes")
    return list(indices.unbind(-1))


def _gather_nd(
    x: Tensor, indices: Tensor, batch_dims: Scalar = 0, validate_indices: Scalar = False
) -> Tensor:
    grid = [
        torch.arange(size).reshape([-1 if i == axis else 1 for i in range(indices.dim() - 1)])
        for axis, size in enumerate(x.shape[: int(batch_dims)])
    ]
    return x[(*grid, *_coordinates(indices, x))]


def _put(data: Tensor, coordinates: list[Tensor], updates: Tensor, mode: str) -> Tensor:
    if mode not in ("update", "add", "sub"):
        raise NotImplementedError(f"mode {mode}")
    changes = -updates if mode == "sub" else updates
    return data.index_put(tuple(coordinates), changes, accumulate=mode != "update")


def _scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Scalar = 0,
    mode: str = "add",
    validate_indices: Scalar = False,
) -> Tensor:
    along = int(axis)
    front = _put(data.movedim(along, 0), [indices], updates.movedim(along, 0), mode)
    return front.movedim(0, along)


def _scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Scalar = 0,
    mode: str = "add",
    validate_indices: Scalar = False,
) -> Tensor:
    along = int(axis) % data.dim()
    coordinates = [
        torch.arange(size).reshape([-1 if i == place else 1 for i in range(data.dim())])
        for place, size in enumerate(indices.shape)
    ]
    coordinates[along] = indices
    return _put(data, coordinates, updates, mode)


def _scatter_nd(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    mode: str = "add",
    validate_indices: Scalar = False,
) -> Tensor:
    return _put(data, _coordinates(indices, data), updates, mode)


def _slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    for axis, (start, length) in enumerate(zip(ints(begin), ints(size), strict=True)):
        first = start % x.shape[axis] if start < 0 else start
        x = x.narrow(axis, first, x.shape[axis] - first if length == -1 else length)
    return x


def _slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    def per_axis(values: Tensor | None, default: int) -> list[int]:
        return [default] * x.dim() if values is None else ints(values)

    steps = per_axis(stride, 1)
    open_begin, open_end = per_axis(begin_mask, 0), per_axis(end_mask, 0)
    starts, ends, single = ints(begin), ints(end), per_axis(squeeze_mask, 0)
    for axis in reversed(range(x.dim())):
        indices = range(x.shape[axis])
        if single[axis]:
            x = x.select(axis, indices[0 if open_begin[axis] else starts[axis]])
            continue
        first = None if open_begin[axis] else starts[axis]
        last = None if open_end[axis] else ends[axis]
        chosen = indices[first : last : steps[axis]]
        if chosen != indices:
            # torch has no negative steps; an index does.
            x = x.index_select(axis, torch.arange(len(chosen)) * chosen.step + chosen.start)
    return x


def _slice_update(x: Tensor, update: Tensor, **bounds: Any) -> Tensor:
    places = _slice_by_index(torch.arange(x.numel()).reshape(x.shape), **bounds)
    changed = x.reshape(-1).index_put([places.reshape(-1)], update.reshape(-1))
    return changed.reshape(x.shape)


def _pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Scalar = 0.0) -> Tensor:
    pairs = ints(pad)
    while pairs[:2] == [0, 0]:
        pairs = pairs[2:]  # torch reflects only the axes that it pads
    innermost_first = [size for i in range(len(pairs) - 2, -1, -2) for size in pairs[i : i + 2]]
    if mode == "constant":
        return F.pad(x, innermost_first, value=float(constant_val))
    return F.pad(x, innermost_first, mode=mode)


def _depth_to_space(x: Tensor, block_size: Tensor) -> Tensor:
    """Like `_pixel_shuffle`, but the place in the block comes before the channel."""
    size = int(block_size)
    batch, depth, height, width = x.shape
    blocks = x.reshape(batch, size, size, depth // size**2, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, height * size, width * size)


def _space_to_depth(x: Tensor, block_size: Tensor) -> Tensor:
    size = int(block_size)
    batch, depth, height, width = x.shape
    blocks = x.reshape(batch, depth, height // size, size, width // size, size)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(batch, -1, height // size, width // size)


def _pixel_shuffle(x: Tensor, upscale_factor: Tensor) -> Tensor:
    return F.pixel_shuffle(x, int(upscale_factor))


def _pixel_unshuffle(x: Tensor, downscale_factor: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, int(downscale_factor))


def _crop(x: Tensor, crop_height: Tensor, crop_width: Tensor) -> Tensor:
    (top, bottom), (left, right) = ints(crop_height), ints(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


TABLE: dict[str, Operator] = {
    "argsort": _argsort,
    "band_part": _band_part,
    "concat": _concat,
    "crop": _crop,
    "cumsum": _cumsum,
    "depth_to_space": _depth_to_space,
    "expand_dims": _expand_dims,
    "fill": _fill,
    "fill_like": _fill_like,
    "flatten2d": _flatten2d,
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "gather_nd": _gather_nd,
    "non_zero": _non_zero,
    "one_hot": _one_hot,
    "pad": _pad,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "range_1d": _range_1d,
    "reshape": _reshape,
    "reverse": _reverse,
    "scatter": _scatter,
    "scatter_along_axis": _scatter_along_axis,
    "scatter_nd": _scatter_nd,
    "shape": _shape,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
    "space_to_depth": _space_to_depth,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "topk": _topk,
    "transpose": _transpose,
}
