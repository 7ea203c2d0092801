"""A copy of a program whose method ``forward`` also returns what it computes on the way.

Tensors of a plan share memory, so each of these gets its own. XNNPACK keeps its tensors to itself;
in the copy they are outputs of its graph, which the plan then has values for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from executorch.exir.scalar_type import ScalarType
from executorch.exir.schema import (
    AllocationDetails,
    DelegateCall,
    EValue,
    KernelCall,
    Tensor,
    TensorList,
    TensorShapeDynamism,
)

from dkm_export.errors import Unsupported
from dkm_exporters.executorch.interpreter import nbytes, place
from dkm_exporters.executorch.program import ProgramFile
from dkm_exporters.executorch.xnnpack import read_graph, replace_graph

_AREA: Final = 1
"""The memory that is planned anew; another one holds buffers."""

_ROOM: Final = 64
"""Bytes after each tensor, as XNNPACK may read beyond its end, and their alignment."""

_MOST_BYTES: Final = 1 << 32
"""Of all tensors."""

_FLOATS: Final = {
    "xnn_datatype_fp32": ScalarType.FLOAT,
    "xnn_datatype_fp16": ScalarType.HALF,
}
"""By XNNPACK's name."""

_INTERNAL: Final = 0xFFFFFFFF
_EXTERNAL_OUTPUT: Final = 2
"""XNNPACK's marks: the number of a value that only the graph knows, and the flag of an output."""


def expose(file: ProgramFile) -> list[str]:
    """Let ``forward`` return all tensors of floats that depend on its inputs, in place.

    Returns:
        A name for each of its outputs: what computes it, and a number.

    Raises:
        Unsupported: when they take too much memory.
        InvalidInput: when a delegate is not in the file.
        IndexError, AttributeError, KeyError, ValueError, RuntimeError: when an instruction or the
            graph of a delegate is malformed.
    """
    return _Exposing(file).run()


@dataclass(frozen=True)
class _Opened:
    """A value of a delegate's graph that becomes an output."""

    name: str
    dtype: ScalarType
    sizes: list[int]


class _Exposing:
    """Follows the instructions through the memory as it was planned, and plans it again."""

    def __init__(self, file: ProgramFile) -> None:
        self._file = file
        self._plan = file.plan("forward")
        self._end: int = self._plan.non_const_buffer_sizes[_AREA]
        self._names: dict[int, str] = {}
        self._graphs: dict[int, tuple[list[int], list[_Opened]]] = {}
        self._written: dict[tuple[int, int], int] = {}
        """The last value that was written to each place."""
        self._same: dict[int, int] = {}
        """Each value that depends on inputs, with the one that it is a view of, or itself."""

    def run(self) -> list[str]:
        """See `expose`."""
        self._write(self._tensors(self._plan.inputs), dependent=True)
        for instruction in [i for chain in self._plan.chains for i in chain.instructions]:
            match instruction.instr_args:
                case KernelCall(op_index=operator, args=arguments):
                    # the last argument is what the operator returns
                    self._call(self._plan.operators[operator].name, arguments, arguments[-1:])
                case DelegateCall() as call:
                    self._delegate(call)
        for index, original in self._same.items():
            if index == original:
                self._move(self._plan.values[index].val)
        for index, original in self._same.items():
            tensor = self._plan.values[original].val
            self._plan.values[index].val.allocation_info = tensor.allocation_info
        self._plan.non_const_buffer_sizes[_AREA] = self._end
        self._plan.outputs = [
            index
            for index in self._names
            if self._plan.values[index].val.scalar_type in _FLOATS.values()
        ]
        return [self._names[index] for index in self._plan.outputs]

    def _call(self, name: str, arguments: list[int], results: list[int]) -> None:
        """Follow an instruction that writes ``results``, which are among its arguments."""
        made = list(self._tensors(results))
        for index in set(self._tensors(arguments)) - {*made, *self._same}:
            # a view has no instruction: it lies where its tensor does
            original = self._written.get(place(self._plan.values[index].val))
            if original in self._same:
                self._same[index] = self._same[original]
        dependent = not self._same.keys().isdisjoint(self._tensors(arguments))
        self._write(made, dependent=dependent)
        if dependent:
            self._names.update((index, f"{name} {index}") for index in made)

    def _write(self, indices: Iterable[int], *, dependent: bool) -> None:
        for index in indices:
            self._written[place(self._plan.values[index].val)] = index
            if dependent:
                self._same[index] = index

    def _tensors(self, arguments: list[int]) -> Iterator[int]:
        """The indices of the tensors among arguments, those in lists too, that are no constants."""
        for index in arguments:
            value = self._plan.values[index].val
            if isinstance(value, TensorList):
                yield from self._tensors(value.items)
            elif isinstance(value, Tensor) and value.allocation_info is not None:
                yield index

    def _move(self, tensor: Any) -> None:
        """Give a tensor memory that no other one has."""
        if tensor.allocation_info.memory_id != _AREA:
            return
        start = -(-self._end // _ROOM) * _ROOM
        self._end = start + nbytes(tensor) + _ROOM
        if self._end > _MOST_BYTES:
            raise Unsupported(f"{self._file.path}: more than 4 GiB of tensors")
        tensor.allocation_info = AllocationDetails(_AREA, start & 0xFFFFFFFF, start >> 32)

    def _delegate(self, call: DelegateCall) -> None:
        """Follow a call of a delegate, and let it return what it computes with, too."""
        index = call.delegate_index
        if index not in self._graphs:
            self._graphs[index] = self._edit(index)
        outputs, opened = self._graphs[index]
        self._call(f"delegate {index}: output", call.args, [call.args[n] for n in outputs])
        for value in opened:
            number = len(self._plan.values)
            call.args.append(number)
            self._names[number] = value.name
            self._plan.values.append(EValue(self._tensor(value)))

    def _edit(self, index: int) -> tuple[list[int], list[_Opened]]:
        """Make all values of a delegate's graph outputs of it.

        Returns:
            Which arguments of a call are outputs, and those that come after.
        """
        processed = self._file.delegate("forward", index)
        graph, outputs, opened = read_graph(processed), [], []
        makers = {
            node["xnode_union"]["output_id"]: node["xnode_union_type"] for node in graph["xnodes"]
        }
        for value in (entry["xvalue_union"] for entry in graph["xvalues"]):
            number = value.get("id_out")
            if number not in makers:
                continue
            if value["external_id"] != _INTERNAL:
                outputs.append(value["external_id"])
                continue
            value["external_id"], value["flags"] = graph["num_externs"], _EXTERNAL_OUTPUT
            graph["num_externs"] += 1
            graph["output_ids"].append(number)
            name = f"delegate {index}: {makers[number].removeprefix('XNN')} {number}"
            opened.append(_Opened(name, _FLOATS[value["datatype"]], value["dims"]))
        self._file.set_delegate("forward", index, replace_graph(processed, graph))
        return outputs, opened

    def _tensor(self, value: _Opened) -> Tensor:
        """A tensor with memory of its own, for batches of at most this size."""
        tensor = Tensor(
            scalar_type=value.dtype,
            storage_offset=0,
            sizes=value.sizes,
            dim_order=list(range(len(value.sizes))),
            requires_grad=False,
            layout=0,
            data_buffer_idx=0,
            allocation_info=AllocationDetails(_AREA, 0, 0),
            shape_dynamism=TensorShapeDynamism.DYNAMIC_BOUND,
        )
        self._move(tensor)
        return tensor
