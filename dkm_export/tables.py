"""Tables as data, and as Markdown: reports show the same rows in several formats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dkm_export.text import visible

STATUS = "status"
"""Header of the column that holds the outcome of checks, in words."""
FILE_STATUS = "file and size"
"""The same of the checks of an artifact's files alone: no runtime has a say in it."""
STATUSES = (STATUS, FILE_STATUS)

_CALM = ("pass", "-")


@dataclass(frozen=True)
class Table:
    """Plain text in rows; empty when there are none.

    Attributes:
        header: names of the columns.
        rows: as many cells as the header has.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
        """A table of anything that can be printed."""
        return cls(tuple(header), tuple(tuple(map(str, row)) for row in rows))

    @property
    def numeric(self) -> list[bool]:
        """The columns that hold numbers, which are read from the right."""
        columns = [[row[i] for row in self.rows] for i in range(len(self.header))]
        return [all(map(_is_number, cells)) and any(cells) for cells in columns]

    def markdown(self) -> str:
        """GitHub's Markdown, or an empty string; a status that is no pass is bold."""
        if not self.rows:
            return ""
        rules = ["---:" if number else "---" for number in self.numeric]
        lines = [list(map(markdown, self.header)), rules]
        for row in self.rows:
            named = zip(self.header, row, strict=True)
            lines.append([_status(x) if name in STATUSES else markdown(x) for name, x in named])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    # addresses become links without any brackets
    return re.sub(
        r"([\\`*_\[\]<>|&~#$]|:(?=//)|(?<=www)\.)", r"\\\1", visible(" ".join(text.split()))
    )


def number(value: float | None, form: str) -> str:
    """A measured value: ``-`` where there is none, and in words where it is NaN or infinite."""
    if value is None:
        return "-"
    return format(value, form) if abs(value) < float("inf") else "not finite"


def _status(text: str) -> str:
    return text if text in _CALM else f"**{markdown(text)}**"


def _is_number(cell: str) -> bool:
    first = cell.partition(" ")[0].lstrip("+-\N{MINUS SIGN}")
    # what has two points is a version
    return first == "" or (first[0].isdigit() and first.count(".") < 2)
