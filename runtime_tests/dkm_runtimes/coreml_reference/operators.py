"""MIL operators on tensors of any rank, as functions of their MIL parameters.

Semantics: ``coremltools.converters.mil.mil.ops.defs`` (iOS 15 to 18). Parameters that a function
lacks are ones that the interpreter refuses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Operator = Callable[..., Tensor | list[Tensor]]

_DTYPES = {"fp16": torch.float32, "fp32": torch.float32, "bool": torch.bool}


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    def operator(x: Tensor) -> Tensor:
        return function(x)

    return operator


def _shifted(function: Callable[[Tensor], Tensor]) -> Operator:
    def operator(x: Tensor, epsilon: Tensor) -> Tensor:
        return function(x + epsilon)

    return operator


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def operator(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return operator


def _reduction(function: Callable[..., Tensor]) -> Operator:
    def operator(x: Tensor, keep_dims: Tensor, axes: Tensor | None = None) -> Tensor:
        every = list(range(x.dim()))
        axis = every if axes is None else ints(axes)
        return function(x, dim=axis, keepdim=bool(keep_dims))

    return operator


def ints(values: Tensor) -> list[int]:
    """A constant tensor as Python integers."""
    return [int(value) for value in values.reshape(-1)]


def _cast(x: Tensor, dtype: str) -> Tensor:
    return x.to(_DTYPES.get(dtype, torch.int64))


def _clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return x.clamp(alpha, beta)


def _elu(x: Tensor, alpha: Tensor) -> Tensor:
    return F.elu(x, float(alpha))


def _leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return F.leaky_relu(x, float(alpha))


def _thresholded_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= alpha, x, torch.zeros_like(x))


def _prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return F.prelu(x, alpha)


def _sigmoid_hard(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def _softmax(x: Tensor, axis: Tensor) -> Tensor:
    return x.softmax(int(axis))


def _layer_norm(
    x: Tensor,
    axes: Tensor,
    epsilon: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    axis = [index % x.dim() for index in ints(axes)]
    variance, mean = torch.var_mean(x, axis, correction=0, keepdim=True)
    along = [size if index in axis else 1 for index, size in enumerate(x.shape)]
    y = (x - mean) * torch.rsqrt(variance + epsilon)
    y = y if gamma is None else y * gamma.reshape(along)
    return y if beta is None else y + beta.reshape(along)


def _batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    epsilon: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon))


def _instance_norm(
    x: Tensor, epsilon: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    return F.instance_norm(x, weight=gamma, bias=beta, eps=float(epsilon))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def _matmul(x: Tensor, y: Tensor, transpose_x: Tensor, transpose_y: Tensor) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _einsum(values: list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


def _select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


def _gather(
    x: Tensor, indices: Tensor, axis: Tensor, batch_dims: Tensor, validate_indices: Tensor
) -> Tensor:
    if batch_dims:
        raise ValueError("batch_dims other than 0 are not known")
    along = int(axis) % x.dim()
    index = torch.where(indices < 0, indices + x.shape[along], indices)
    taken = x.index_select(along, index.reshape(-1))
    return taken.reshape(*x.shape[:along], *indices.shape, *x.shape[along + 1 :])


def _argmax(x: Tensor, axis: Tensor, keep_dims: Tensor, output_dtype: str = "int32") -> Tensor:
    return x.argmax(int(axis), bool(keep_dims))


def _reshape(x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape(ints(shape))


def _transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(ints(perm))


def _expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(index % rank for index in ints(axes)):
        x = x.unsqueeze(axis)
    return x


def _squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(ints(axes))


def _concat(values: list[Tensor], axis: Tensor, interleave: Tensor) -> Tensor:
    if interleave:
        raise ValueError("interleave is not known")
    return torch.cat(values, int(axis))


def _stack(values: list[Tensor], axis: Tensor) -> Tensor:
    return torch.stack(values, int(axis))


def _split(
    x: Tensor,
    axis: Tensor,
    num_splits: Tensor | None = None,
    split_sizes: Tensor | None = None,
) -> list[Tensor]:
    if num_splits is not None:
        return list(x.tensor_split(int(num_splits), int(axis)))
    if split_sizes is None:
        raise ValueError("neither num_splits nor split_sizes is given")
    return list(x.split(ints(split_sizes), int(axis)))


def _tile(x: Tensor, reps: Tensor) -> Tensor:
    return x.repeat(ints(reps))


def _reverse(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.flip(list(range(x.dim())) if axes is None else ints(axes))


def _cumsum(x: Tensor, axis: Tensor, exclusive: Tensor, reverse: Tensor) -> Tensor:
    along = int(axis)
    ordered = x.flip(along) if reverse else x
    total = ordered.cumsum(along) - (ordered if exclusive else 0)
    return total.flip(along) if reverse else total


def _band_part(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Keep ``lower`` diagonals below the main one and ``upper`` above it; -1 keeps all."""
    x = x if lower < 0 else x.triu(-int(lower))
    return x if upper < 0 else x.tril(int(upper))


def _slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    for axis, (start, length) in enumerate(zip(ints(begin), ints(size), strict=True)):
        x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
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
            x = x.select(axis, indices[starts[axis]])
            continue
        first = None if open_begin[axis] else starts[axis]
        last = None if open_end[axis] else ends[axis]
        # torch has no negative steps; an index does.
        x = x.index_select(
            axis, torch.tensor(indices[first : last : steps[axis]], dtype=torch.int64)
        )
    return x


def _pad(
    x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Tensor | None = None
) -> Tensor:
    pairs = ints(pad)
    while pairs[:2] == [0, 0]:
        pairs = pairs[2:]  # torch reflects only the axes that it pads
    innermost_first = [size for i in range(len(pairs) - 2, -1, -2) for size in pairs[i : i + 2]]
    if mode == "constant":
        return F.pad(x, innermost_first, value=0.0 if constant_val is None else float(constant_val))
    return F.pad(x, innermost_first, mode=mode)


TABLE: dict[str, Operator] = {
    "abs": _unary(torch.abs),
    "cos": _unary(torch.cos),
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp),
    "floor": _unary(torch.floor),
    "identity": _unary(torch.clone),
    "logical_not": _unary(torch.logical_not),
    "relu": _unary(torch.relu),
    "relu6": _unary(F.relu6),
    "sigmoid": _unary(torch.sigmoid),
    "silu": _unary(F.silu),
    "sin": _unary(torch.sin),
    "softplus": _unary(F.softplus),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "tanh": _unary(torch.tanh),
    "inverse": _shifted(torch.reciprocal),
    "log": _shifted(torch.log),
    "rsqrt": _shifted(torch.rsqrt),
    "add": _binary(torch.add),
    "equal": _binary(torch.eq),
    "floor_div": _binary(torch.floor_divide),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "logical_and": _binary(torch.logical_and),
    "logical_or": _binary(torch.logical_or),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "mod": _binary(torch.remainder),
    "mul": _binary(torch.mul),
    "not_equal": _binary(torch.ne),
    "pow": _binary(torch.pow),
    "real_div": _binary(torch.div),
    "sub": _binary(torch.sub),
    "reduce_l2_norm": _reduction(torch.linalg.vector_norm),
    "reduce_max": _reduction(torch.amax),
    "reduce_mean": _reduction(torch.mean),
    "reduce_min": _reduction(torch.amin),
    "reduce_sum": _reduction(torch.sum),
    "band_part": _band_part,
    "batch_norm": _batch_norm,
    "cast": _cast,
    "clip": _clip,
    "concat": _concat,
    "cumsum": _cumsum,
    "einsum": _einsum,
    "elu": _elu,
    "expand_dims": _expand_dims,
    "gather": _gather,
    "gelu": _gelu,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "leaky_relu": _leaky_relu,
    "linear": _linear,
    "matmul": _matmul,
    "pad": _pad,
    "prelu": _prelu,
    "reduce_argmax": _argmax,
    "reshape": _reshape,
    "reverse": _reverse,
    "scaled_dot_product_attention": _attention,
    "select": _select,
    "sigmoid_hard": _sigmoid_hard,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "softmax": _softmax,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "thresholded_relu": _thresholded_relu,
    "tile": _tile,
    "transpose": _transpose,
}
