"""Keep a program from taking more memory or time than any real one needs.

Sizes in a package are claims: one number can ask for a tensor of terabytes. Every call that torch
makes, also inside its own functions, is first made with tensors that have shapes and no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

MOST_BYTES: Final = 1 << 30
"""Of what one call gives."""

MOST_BYTES_TOGETHER: Final = 1 << 32
"""Of all values that a program still needs."""

MOST_WORK: Final = 1 << 40
"""Floating point operations of one call: about a minute."""

MOST_NUMBERS: Final = 4096
"""In a list of sizes, axes or the like; and of results of one operator."""

MOST_STEPS: Final = 1 << 14
"""Of a recurrent operator."""

_aten: Final = torch.ops.aten

_BY_INPUT: Final = frozenset({_aten.nonzero.default, _aten._local_scalar_dense.default})
"""Their results depend on values, and are not much larger than their inputs."""

_POOLS: Final = frozenset(
    {
        _aten.avg_pool2d,
        _aten.avg_pool3d,
        _aten.max_pool2d_with_indices,
        _aten.max_pool3d_with_indices,
    }
)
"""Their work is each output's window, the second argument; 1-d ones become 2-d ones."""


class TooLarge(NotImplementedError):
    """An operation would exceed one of the bounds above."""


def bounded() -> AbstractContextManager[object]:
    """A context in which torch refuses calls that are too large, before anything is allocated.

    Scratch memory inside of a single kernel is torch's own matter and not counted.

    Raises:
        TooLarge: within it, instead of computing.
    """
    mode: AbstractContextManager[object] = _Bounded()  # type: ignore[no-untyped-call]
    return mode


class _Bounded(TorchDispatchMode):
    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _BY_INPUT:
            shapes = tree_map(_without_memory, args)
            named = tree_map(_without_memory, kwargs)
            if "device" in named:
                named["device"] = "meta"
            result = func(*shapes, **named)
            _check(func.overloadpacket, shapes, named, result)
        return func(*args, **kwargs)


def nbytes(value: object) -> int:
    """Bytes of a tensor, as if it shared them with no other; 0 for anything else."""
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def check_bytes(size: int) -> None:
    """Refuse a value of more than `MOST_BYTES`.

    Raises:
        TooLarge: then.
    """
    if size > MOST_BYTES:
        raise TooLarge(f"it takes {size} bytes of memory, more than 1 GiB")


def _check(operator: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
    outputs = tree_leaves(result)
    check_bytes(sum(nbytes(output) for output in outputs))
    count: Callable[..., int] | None = flop_registry.get(operator)
    work = 0
    if count is not None:
        work = count(*args, **kwargs, out_val=result)
    elif operator in _POOLS:
        work = outputs[0].numel() * math.prod(args[1])
    if work > MOST_WORK:
        raise TooLarge(f"it takes {work:.0e} operations, more than {MOST_WORK:.0e}")


def _without_memory(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
