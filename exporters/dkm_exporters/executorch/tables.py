"""FlatBuffers read without trust: every offset is checked, and no part is read many times.

Tables may refer to the same part again and again, and so a small file could claim to hold
thousands of large ones. Sound files share next to nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Self, get_origin, get_type_hints

from flatbuffers.table import Table as Union

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_SHARED: Final = 4
"""How many times its size may be read of a file."""

_GENERATED: Final = "executorch.exir._serialize.generated.executorch_flatbuffer"
_UNIONS: Final = {"Val": "KernelTypes", "InstrArgs": "InstructionArguments"}
"""The types that a field may have which is a table of one of several types."""


@dataclass
class Budget:
    """What is left to be read.

    Attributes:
        left: in bytes.
    """

    left: int

    @classmethod
    def of(cls, size: int) -> Self:
        """That of a file of this size."""
        return cls(_SHARED * size)

    def take(self, count: int) -> None:
        """Read some bytes.

        Raises:
            ValueError: when so many are not left.
        """
        self.left -= count
        if self.left < 0:
            raise ValueError("parts of the file overlap")


class Table:
    """One table, whose fields are numbered as in its schema; an absent one has its default.

    Args:
        data: the FlatBuffer.
        start: of the table.
        budget: of the file.

    Raises:
        ValueError, struct.error: when it is not within the data; so do its methods.
    """

    def __init__(self, data: memoryview, start: int, budget: Budget) -> None:
        self._data, self._start, self._budget = data, start, budget
        self._fields = start - self._get("<i", start)
        self._size = self._get("<H", self._fields)
        budget.take(self._size)

    @classmethod
    def root(cls, data: memoryview) -> Self:
        """The table that a FlatBuffer is."""
        (start,) = struct.unpack_from("<I", data)
        return cls(data, start, Budget.of(len(data)))

    def number(self, field: int, form: str = "<I") -> Any:
        """A number, by its format for `struct`; 0 by default."""
        place = self._place(field)
        return self._get(form, place) if place else 0

    def table(self, field: int) -> Table | None:
        """A table, or None."""
        place = self._place(field)
        return Table(self._data, self._follow(place), self._budget) if place else None

    def tables(self, field: int) -> Iterator[Table]:
        """Those of a list."""
        for place in self._items(field, 4):
            yield Table(self._data, self._follow(place), self._budget)

    def numbers(self, field: int, form: str = "<I") -> list[Any]:
        """Those of a list."""
        return [self._get(form, place) for place in self._items(field, struct.calcsize(form))]

    def text(self, field: int) -> str:
        """A text, empty by default."""
        items = self._items(field, 1)
        return bytes(self._data[items.start : items.stop]).decode()

    def _place(self, field: int) -> int:
        """Where a field is, or 0."""
        entry = 4 + 2 * field
        offset = self._get("<H", self._fields + entry) if entry < self._size else 0
        return self._start + offset if offset else 0

    def _items(self, field: int, size: int) -> range:
        """Where those of a list are."""
        place = self._place(field)
        if not place:
            return range(0)
        start = self._follow(place)
        count = self._get("<I", start)
        self._budget.take(count * size)
        if start + 4 + count * size > len(self._data):
            raise ValueError("a list ends after the file")
        return range(start + 4, start + 4 + count * size, size)

    def _follow(self, place: int) -> int:
        return place + int(self._get("<I", place))

    def _get(self, form: str, place: int) -> Any:
        if place < 0:  # which would count from the end
            raise ValueError("an offset leads out of the file")
        return struct.unpack_from(form, self._data, place)[0]


def require_bounded(part: object, budget: Budget) -> None:
    """Read all of an ExecuTorch program, as its generated class gives it, within the budget.

    What makes objects of it then needs no more than some multiple of the file's size.

    Raises:
        ValueError, struct.error and others: when the program is malformed.
    """
    lists, fields = _accessors(tuple(vars(type(part))))
    for name in lists:
        count = getattr(part, f"{name}Length")()
        budget.take(count)
        for index in range(count):
            item = getattr(part, name)(index)
            if not _visit(item, budget):
                break  # numbers, which are counted already
    for name in fields:
        value = getattr(part, name)()
        if isinstance(value, Union):
            value = _as(_UNIONS[name], getattr(part, f"{name}Type")(), value)
        _visit(value, budget)


def _visit(value: Any, budget: Budget) -> bool:
    """Read a part that is more than a number."""
    if isinstance(value, bytes):
        budget.take(4 + len(value))
    elif hasattr(value, "_tab"):
        budget.take(4)
        require_bounded(value, budget)
    else:
        return False
    return True


@cache
def _accessors(methods: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Those of the methods that give an item of a list, and of those that give one value."""
    names = [name for name in methods if name[0].isupper() and name != "Init"]
    lists = [name for name in names if f"{name}Length" in names]
    counts = {f"{name}{end}" for name in lists for end in ("Length", "IsNone", "AsNumpy")}
    fields = [
        name
        for name in names
        if not (name in lists or name in counts or name.startswith("GetRoot"))
        and "HasIdentifier" not in name
    ]
    return lists, fields


def _as(union: str, number: int, table: Any) -> Any:
    """What a union holds, which says it by a number."""
    kinds = vars(getattr(import_module(f"{_GENERATED}.{union}"), union))
    (name,) = [name for name, value in kinds.items() if value == number and name[0] != "_"]
    value = getattr(import_module(f"{_GENERATED}.{name}"), name)()
    value.Init(table.Bytes, table.Pos)
    return value


def fill(part: DataclassInstance) -> None:
    """Let absent lists and texts of a program be empty, as the runtime takes them, in place."""
    for name, kind in _kinds(part).items():
        value = getattr(part, name)
        if value is None and kind in (list, str, bytes):
            setattr(part, name, kind())
        for item in value if isinstance(value, list) else [value]:
            if is_dataclass(item) and not isinstance(item, type):
                fill(item)


def _kinds(part: DataclassInstance) -> dict[str, type]:
    """By field, what it holds without the types of items."""
    key = type(part).__name__
    if key not in _KINDS:
        hints = get_type_hints(type(part))
        _KINDS[key] = {name: get_origin(hint) or hint for name, hint in hints.items()}
    return _KINDS[key]


_KINDS: Final[dict[str, dict[str, type]]] = {}
