"""Where does a runtime leave PyTorch? Its intermediate tensors beside those of PyTorch.

Nothing in an artifact says which of its tensors is which of PyTorch's: targets rename, fuse and
reorder. So a tensor is recognised by what it holds. One of PyTorch's is right where a tensor of the
runtime equals it, in whatever order of axes; and what a right one was computed from is right too,
as targets fuse layers with what follows. The difference arises in the first step that is not right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from operator import getitem
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from dkm_export.checking.report import Finding, Status, failed
from dkm_export.checking.runtime import Runtime
from dkm_export.palettized import PalettizedModel

Array = npt.NDArray[Any]

_RESEMBLES: Final = 0.5
"""Relative L2 up to which one tensor is taken for a wrong version of another."""

_ALIKE: Final = 3
"""How many times the least relative L2 is still about as alike."""

_MOST_AXES: Final = 6
"""Beyond, there are too many orders of axes to try."""


@dataclass(frozen=True, eq=False)
class Step:
    """One operation of the model in PyTorch, of those that depend on its inputs.

    Attributes:
        name: the layer or module, and the operator.
        value: what it gives; None where that tells nothing: integers, constants, infinite masks.
        takes: the steps before it.
        layer: whether it takes parameters; otherwise it stands between layers.
        folds: whether it is a batch norm, which targets make a part of the layer before it.
    """

    name: str
    value: Array | None
    takes: Sequence[Step] = ()
    layer: bool = False
    folds: bool = False


def localise(
    artifact: Path,
    runtime: Runtime,
    model: PalettizedModel,
    inputs: Mapping[str, Tensor],
    limit: float,
) -> Finding:
    """Name the first layer whose output on the runtime is not PyTorch's.

    Args:
        artifact: of which outputs are wrong.
        runtime: that gives them.
        model: the checkpoint.
        inputs: by name, of one sample.
        limit: the largest relative L2 of a tensor that is right.

    Returns:
        A failure, or ``not_run`` with the reason why nothing is known.
    """
    try:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        shown = _Shown(runtime.intermediates(artifact, arrays))
        steps = record(model.build(), tuple(inputs.values()))
        return failed("localisation", _describe(steps, shown, limit))
    except Exception as error:  # whatever a runtime or torch.export raises: it is no verdict
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        message = f"the first wrong layer is not known: {reason}"
        return Finding(check="localisation", status=Status.NOT_RUN, message=message)


def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Step]:
    """What PyTorch computes for ``inputs``, in order."""
    with torch.no_grad():
        # without decompositions: only operations in place become others
        program = torch.export.export(module, inputs).run_decompositions({})
        recorder = _Recorder(program.module())
        recorder.run(*inputs)
    return list(recorder.steps.values())


class _Recorder(fx.Interpreter):
    """Runs an exported graph and makes a step of each operation."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.steps: dict[fx.Node, Step] = {}
        self._takes: dict[fx.Node, list[Step]] = {}
        self._parameters: dict[fx.Node, set[str]] = {}

    def run_node(self, node: fx.Node) -> Any:
        """Run it; what is made of parameters alone, or several tensors at once, is no step."""
        result = super().run_node(node)
        sources = node.all_input_nodes
        takes = [step for source in sources for step in self._takes[source]]
        names = set[str]().union(*(self._parameters[source] for source in sources))
        if node.op == "placeholder":
            self.steps[node] = Step(node.name, None)
        elif node.op == "get_attr":
            names = {str(node.target)}
        elif node.op == "call_function" and takes and not isinstance(result, tuple | list):
            operator = _operator(node)
            self.steps[node] = Step(
                name=_name(node, operator, names),
                value=_comparable(result),
                takes=takes,
                layer=bool(names),
                folds="batch_norm" in operator,
            )
        if node in self.steps:
            takes, names = [self.steps[node]], set()
        self._takes[node], self._parameters[node] = takes, names
        return result


def _operator(node: fx.Node) -> str:
    if node.target is getitem:
        node = node.all_input_nodes[0]
    return getattr(node.target, "__name__", str(node.target)).partition(".")[0]


def _name(node: fx.Node, operator: str, parameters: set[str]) -> str:
    """The layer that has the parameters, or the operator and the module that it is in."""
    if parameters:
        return ", ".join(sorted({name.rpartition(".")[0] or name for name in parameters}))
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    path, _ = next(reversed(stack.values()))
    return f"{operator} in {path.partition('@')[0] or 'the model'}"


def _comparable(result: Any) -> Array | None:
    if not isinstance(result, Tensor) or not result.is_floating_point():
        return None
    array: Array = result.float().numpy().copy()
    varies = array.size > 1 and bool((array != array.flat[0]).any())
    return array if varies and np.isfinite(array).all() else None


@dataclass
class _Entry:
    """A tensor of the runtime; ``claimed`` when it is one of PyTorch's."""

    name: str
    array: Array
    norm: float
    claimed: bool = False


class _Shown:
    """The tensors that a runtime shows."""

    def __init__(self, tensors: Iterable[tuple[str, Array]]) -> None:
        self._entries: dict[int, list[_Entry]] = defaultdict(list)
        for name, array in tensors:
            if array.dtype.kind == "f":
                self._entries[array.size].append(_Entry(name, array, _norm(array)))

    def have(self, value: Array, limit: float) -> bool:
        """Whether one of them is ``value``, within a relative L2 of ``limit``."""
        norm = _norm(value)
        equal = [
            entry
            for entry in self._entries[value.size]
            # the difference is at least that of the norms, which takes no order of axes
            if abs(entry.norm - norm) <= limit * norm and _distance(value, entry.array) <= limit
        ]
        for entry in equal:
            entry.claimed = True
        return bool(equal)

    def closest(self, value: Array) -> tuple[float, str]:
        """The relative L2 and the name of the most similar one, of those that are nothing else."""
        found = [
            (_distance(value, entry.array), entry.name)
            for entry in self._entries[value.size]
            if not entry.claimed
        ]
        return min(found, default=(np.inf, ""))


def _norm(array: Array) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def _distance(expected: Array, found: Array) -> float:
    """The least relative L2 over all orders of axes in which the sizes fit."""
    exact = expected.astype(np.float64)
    errors = [_norm(exact - array) for array in _arranged(found, expected.shape)]
    return float(np.nanmin([*errors, np.inf])) / _norm(exact)


def _arranged(array: Array, shape: tuple[int, ...]) -> Iterator[Array]:
    """``array`` in this shape: as it lies in memory, and with its axes in other orders."""
    yield array.reshape(shape)
    array, sizes = array.squeeze(), [size for size in shape if size > 1]
    if sorted(array.shape) == sorted(sizes) and len(sizes) <= _MOST_AXES:
        for order in permutations(range(len(sizes))):
            if [array.shape[axis] for axis in order] == sizes:
                yield array.transpose(order).reshape(shape)


def _right(steps: Sequence[Step], shown: _Shown, limit: float) -> set[Step]:
    """The steps that the runtime shows as they are, and what these are computed from.

    That ends at layers that are not shown: beyond, a difference may have become small.
    """
    right: set[Step] = set()
    for step in reversed(steps):
        # all are looked for, so that none is taken for another's wrong version
        found = step.value is not None and shown.have(step.value, limit)
        if found or step in right:
            right.add(step)
            if found or step.folds or not step.layer:
                right.update(step.takes)
    return right


def _describe(steps: Sequence[Step], shown: _Shown, limit: float) -> str:
    """What there is to say about the first step that is not right."""
    right = _right(steps, shown, limit)
    layers = 0
    hidden: list[Step] = []
    doubtful: set[Step] = set()
    unlike = ""
    for step in steps:
        if step in right:
            layers += step.layer
        elif not doubtful.isdisjoint(step.takes):
            doubtful.add(step)
        elif like := _likeness(step, steps, shown):
            like += f", limit {limit:.0e}"
            return _first_wrong(step, like, layers, _before(step, hidden))
        elif step.layer:
            # or right and not shown: then another one that does not depend on it may be wrong
            doubtful.add(step)
            like = "no tensor of the artifact is like its output"
            unlike = unlike or _first_wrong(step, like, layers, _before(step, hidden))
        elif step.value is not None:
            hidden.append(step)
    if unlike:
        return unlike
    if hidden:
        names = _listed([step.name for step in hidden])
        return f"all {layers} layers agree: the difference arises after them, in {names}"
    return (
        f"all {layers} layers and the outputs agree within a relative L2 of {limit:.0e} when the "
        "runtime shows every tensor, which keeps it from fusing operations"
    )


def _likeness(step: Step, steps: Sequence[Step], shown: _Shown) -> str:
    """What is wrong with the tensor that is most like what ``step`` gives; nothing if none is.

    A layer may be one operation with what follows it, as long as nothing else takes its output.
    """
    fused = [step]
    while step.layer:
        users = [user for user in steps if fused[-1] in user.takes]
        if len(users) != 1 or (users[0].layer and not users[0].folds):
            break
        fused += users
    found = [(*shown.closest(each.value), each) for each in fused if each.value is not None]
    least = min((error for error, _, _ in found), default=np.inf)
    if least > _RESEMBLES:
        return ""
    # not the most alike one: what follows a layer often makes a difference smaller
    error, tensor, like = next(entry for entry in found if entry[0] <= _ALIKE * least)
    after = "" if like is step else f" after {like.name}"
    return f"relative L2 {error:.1e}{after} in tensor '{tensor}'"


def _before(step: Step, hidden: Sequence[Step]) -> list[Step]:
    """Those of ``hidden`` that ``step`` is computed from, with nothing shown in between."""
    found: dict[Step, None] = {}
    for source in step.takes:
        if source in hidden:
            found.update(dict.fromkeys([*_before(source, hidden), source]))
    return list(found)


def _first_wrong(step: Step, like: str, layers: int, hidden: Sequence[Step]) -> str:
    kind = "layer" if step.layer else "step"
    between = f"; not shown just before it: {_listed([s.name for s in hidden])}" if hidden else ""
    return f"first wrong {kind}: {step.name} ({like}); {layers} layers before it agree{between}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
