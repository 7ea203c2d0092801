"""Whether ``forward`` takes the weights that ``init`` has decoded, as far as a file tells.

``init`` copies each decoded weight, and the token, to a place in memory of its own, once.
``forward`` takes from these places, under the same names, and writes to none of them. Which layer
it takes a weight for is not said: its delegates count their arguments, and the header has the
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from dkm_export.errors import InvalidInput
from dkm_exporters.executorch.header import TOKEN
from dkm_exporters.executorch.interpreter import Step, nbytes, place
from dkm_exporters.executorch.program import ProgramFile, buffer_name

_AREA = 2
"""The memory of mutable buffers; what else a method computes is in area 1."""


@dataclass
class Buffers:
    """Follows the instructions of both methods.

    Attributes:
        file: the program.
    """

    file: ProgramFile
    _names: dict[tuple[int, int, int, str], str] = field(default_factory=dict)
    _used: list[str] = field(default_factory=list)

    def written(self, step: Step, layer: str) -> None:
        """One instruction of ``init``.

        Args:
            step: the instruction.
            layer: whose decoded weight its result is, or an empty string.

        Raises:
            InvalidInput: when it does anything with a buffer but to write it for the first time.
        """
        touched = [_key(tensor) for tensor in step.tensors if _is_buffer(tensor)]
        if not touched:
            return
        key = touched[0]
        name = layer or (TOKEN if key[-1] == TOKEN else "")
        if step.into is None or {*touched} != {_key(step.into)} or key in self._names or not name:
            raise InvalidInput(
                f"{self.file.path}: init writes '{key[-1]}' otherwise than by decoding a palette: "
                "export it again"
            )
        self._names[key] = name

    def taken(self, step: Step) -> None:
        """One instruction of ``forward``.

        Raises:
            InvalidInput: when it touches memory that is not one of the buffers.
        """
        for tensor in step.tensors:
            if not _is_buffer(tensor):
                continue
            name = self._names.get(_key(tensor))
            if name is None:
                raise InvalidInput(
                    f"{self.file.path}: forward uses '{buffer_name(tensor)}' from where init does "
                    "not write it: export it again"
                )
            self._used.append(name)

    def check(self, expected: Sequence[str]) -> None:
        """Compare what ``forward`` takes with the order in the header.

        Raises:
            InvalidInput: when they differ, buffers overlap, or one is not used.
        """
        ends = [(offset, offset + size) for _, offset, size, _ in sorted(self._names)]
        if any(end > start for (_, end), (start, _) in pairwise(ends)):
            raise InvalidInput(f"{self.file.path}: buffers of init overlap: export it again")
        if self._used != list(expected) or {*self._used} != {*self._names.values()}:
            raise InvalidInput(
                f"{self.file.path}: forward does not use the weights that init decodes in the "
                "header's order: export it again"
            )


def _is_buffer(tensor: Any) -> bool:
    return place(tensor)[0] == _AREA or bool(buffer_name(tensor))


def _key(tensor: Any) -> tuple[int, int, int, str]:
    return (*place(tensor), nbytes(tensor), buffer_name(tensor))
