"""MIL operators that compute: element by element, along axes, and products.

Semantics and defaults: ``coremltools.converters.mil.mil.ops.defs`` (iOS 15 to 18). A function's
parameters are those of all versions of its operator; one that it lacks is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dkm_runtimes.coreml_reference.bounds import MOST_NUMBERS, TooLarge

Result = Tensor | str
Operator = Callable[..., Result | list[Result] | list[Tensor]]

Scalar = Tensor | float
"""A number or truth value; Python's where it is a default."""

DTYPES = {
    "bool": torch.bool,
    "fp16": torch.float32,
    "fp32": torch.float32,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
}
"""What a name in a program means here: the interpreter rounds to float16 itself, where it does."""


def ints(values: Tensor) -> list[int]:
    """A tensor of sizes, axes or the like as Python integers.

    Raises:
        TooLarge: when they are far more than any operator takes.
    """
    if values.numel() > MOST_NUMBERS:
        raise TooLarge(f"a list of {values.numel()} numbers")
    return [int(value) for value in values.reshape(-1)]


def integers(values: Tensor, dtype: str = "int32") -> Tensor:
    """Numbers cut to the range of an integer type; all of them are int64 here."""
    return values.to(DTYPES[dtype]).to(torch.int64)


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    def operator(x: Tensor) -> Tensor:
        return function(x)

    return operator


def _shifted(function: Callable[[Tensor], Tensor], default: float) -> Operator:
    def operator(x: Tensor, epsilon: Scalar = default) -> Tensor:
        return function(x + epsilon)

    return operator


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def operator(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return operator


def _reduction(function: Callable[..., Tensor]) -> Operator:
    def operator(x: Tensor, axes: Tensor | None = None, keep_dims: Scalar = False) -> Tensor:
        axis = list(range(x.dim())) if axes is None else ints(axes)
        return function(x, dim=axis, keepdim=bool(keep_dims))

    return operator


def _extreme(function: Callable[[Tensor, int, bool], Tensor]) -> Operator:
    def operator(
        x: Tensor, axis: Scalar = -1, keep_dims: Scalar = False, output_dtype: str = "int32"
    ) -> Tensor:
        return integers(function(x, int(axis), bool(keep_dims)), output_dtype.lower())

    return operator


def _product(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in dim), reverse=True):
        x = x.prod(axis, keepdim)
    return x


def _cast(x: Tensor, dtype: str) -> Tensor:
    if dtype not in DTYPES:
        raise NotImplementedError(f"a cast to {dtype}")
    if dtype.startswith(("int", "uint")):
        return integers(x, dtype)
    return x.to(DTYPES[dtype])


def _clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return x.clamp(alpha, beta)


def _threshold(x: Tensor, alpha: Tensor) -> Tensor:
    return x.clamp(min=alpha)


def _clamped_relu(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


def _elu(x: Tensor, alpha: Tensor) -> Tensor:
    return F.elu(x, float(alpha))


def _leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return F.leaky_relu(x, float(alpha))


def _linear_activation(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return alpha * x + beta


def _thresholded_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= alpha, x, torch.zeros_like(x))


def _prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return F.prelu(x, alpha)


def _scaled_tanh(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return alpha * torch.tanh(beta * x)


def _sigmoid_hard(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def _softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    along = [-1 if axis == 1 else 1 for axis in range(x.dim())]
    return alpha.reshape(along) * F.softplus(beta.reshape(along) * x)


def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def _softmax(x: Tensor, axis: Scalar = -1) -> Tensor:
    return x.softmax(int(axis))


def _layer_norm(
    x: Tensor,
    axes: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Scalar = 1e-5,
) -> Tensor:
    axis = list(range(x.dim())) if axes is None else [index % x.dim() for index in ints(axes)]
    variance, mean = torch.var_mean(x, axis, correction=0, keepdim=True)
    along = [size if index in axis else 1 for index, size in enumerate(x.shape)]
    y = (x - mean) * torch.rsqrt(variance + epsilon)
    y = y if gamma is None else y * gamma.reshape(along)
    return y if beta is None else y + beta.reshape(along)


def _batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Scalar = 1e-5,
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon))


def _instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Scalar = 1e-5
) -> Tensor:
    return F.instance_norm(x, weight=gamma, bias=beta, eps=float(epsilon))


def _l2_norm(x: Tensor, epsilon: Scalar = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


def _local_response_norm(
    x: Tensor, size: Tensor, alpha: Scalar = 1e-4, beta: Scalar = 0.75, k: Scalar = 1.0
) -> Tensor:
    return F.local_response_norm(x, int(size), float(alpha), float(beta), float(k))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def _matmul(
    x: Tensor, y: Tensor, transpose_x: Scalar = False, transpose_y: Scalar = False
) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _einsum(values: list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    attended: Tensor = scores.softmax(-1) @ value
    return attended


def _select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


def _along(x: Tensor, values: Tensor, axis: Tensor | None) -> Tensor:
    """One value per element of an axis, or a single one, in the rank of ``x``."""
    if axis is None:
        return values
    position = int(axis) % x.dim()
    return values.reshape([-1 if index == position else 1 for index in range(x.dim())])


def _quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: Tensor | None = None,
) -> Tensor:
    limits = torch.iinfo(DTYPES[output_dtype])
    steps = (input / _along(input, scale, axis)).round()
    if zero_point is not None:
        steps = steps + _along(input, zero_point, axis)
    return steps.clamp(limits.min, limits.max).to(torch.int64)


def _dequantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: Tensor | None = None,
) -> Tensor:
    steps = input if zero_point is None else input - _along(input, zero_point, axis)
    return steps * _along(input, scale, axis)


def _classify(probabilities: Tensor, classes: tuple[str | int, ...]) -> list[Result]:
    """The label, and in place of the dictionary the probabilities in the order of the labels."""
    flat = probabilities.reshape(-1)
    if flat.numel() != len(classes):
        raise ValueError(f"{flat.numel()} probabilities for {len(classes)} classes")
    label = classes[int(flat.argmax())]
    return [label if isinstance(label, str) else torch.tensor(label), flat]


TABLE: dict[str, Operator] = {
    "abs": _unary(torch.abs),
    "acos": _unary(torch.acos),
    "asin": _unary(torch.asin),
    "atan": _unary(torch.atan),
    "atanh": _unary(torch.atanh),
    "ceil": _unary(torch.ceil),
    "cos": _unary(torch.cos),
    "cosh": _unary(torch.cosh),
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp),
    "exp2": _unary(torch.exp2),
    "floor": _unary(torch.floor),
    "identity": _unary(torch.clone),
    "logical_not": _unary(torch.logical_not),
    "relu": _unary(torch.relu),
    "relu6": _unary(F.relu6),
    "round": _unary(torch.round),
    "sigmoid": _unary(torch.sigmoid),
    "sign": _unary(torch.sign),
    "silu": _unary(F.silu),
    "sin": _unary(torch.sin),
    "sinh": _unary(torch.sinh),
    "softplus": _unary(F.softplus),
    "softsign": _unary(F.softsign),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "tan": _unary(torch.tan),
    "tanh": _unary(torch.tanh),
    "inverse": _shifted(torch.reciprocal, 1e-4),
    "log": _shifted(torch.log, 1e-45),
    "rsqrt": _shifted(torch.rsqrt, 1e-12),
    "add": _binary(torch.add),
    "equal": _binary(torch.eq),
    "floor_div": _binary(torch.floor_divide),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "logical_and": _binary(torch.logical_and),
    "logical_or": _binary(torch.logical_or),
    "logical_xor": _binary(torch.logical_xor),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "mod": _binary(torch.remainder),
    "mul": _binary(torch.mul),
    "not_equal": _binary(torch.ne),
    "pow": _binary(torch.pow),
    "real_div": _binary(torch.div),
    "sub": _binary(torch.sub),
    "reduce_argmax": _extreme(torch.argmax),
    "reduce_argmin": _extreme(torch.argmin),
    "reduce_l1_norm": _reduction(lambda x, dim, keepdim: x.abs().sum(dim, keepdim)),
    "reduce_l2_norm": _reduction(torch.linalg.vector_norm),
    "reduce_log_sum": _reduction(lambda x, dim, keepdim: x.sum(dim, keepdim).log()),
    "reduce_log_sum_exp": _reduction(torch.logsumexp),
    "reduce_max": _reduction(torch.amax),
    "reduce_mean": _reduction(torch.mean),
    "reduce_min": _reduction(torch.amin),
    "reduce_prod": _reduction(_product),
    "reduce_sum": _reduction(torch.sum),
    "reduce_sum_square": _reduction(lambda x, dim, keepdim: x.square().sum(dim, keepdim)),
    "batch_norm": _batch_norm,
    "cast": _cast,
    "clamped_relu": _clamped_relu,
    "classify": _classify,
    "clip": _clip,
    "dequantize": _dequantize,
    "einsum": _einsum,
    "elu": _elu,
    "gelu": _gelu,
    "instance_norm": _instance_norm,
    "l2_norm": _l2_norm,
    "layer_norm": _layer_norm,
    "leaky_relu": _leaky_relu,
    "linear": _linear,
    "linear_activation": _linear_activation,
    "local_response_norm": _local_response_norm,
    "matmul": _matmul,
    "prelu": _prelu,
    "quantize": _quantize,
    "scaled_dot_product_attention": _attention,
    "scaled_tanh": _scaled_tanh,
    "select": _select,
    "sigmoid_hard": _sigmoid_hard,
    "softmax": _softmax,
    "softplus_parametric": _softplus_parametric,
    "threshold": _threshold,
    "thresholded_relu": _thresholded_relu,
}
