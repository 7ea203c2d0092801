"""What the user sees: prose and progress on stderr, results on stdout."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dkm_export.errors import DkmWarning
from dkm_export.tables import Table
from dkm_export.text import printable

if TYPE_CHECKING:
    from dkm_export.training.stage import Progress

_SCHEMA_VERSION = 1

_WIDEST = 200
"""Characters of a cell."""


@dataclass(frozen=True)
class Terminal:
    """Where a command prints.

    Attributes:
        json: results go to stdout as one JSON object instead of as tables.
        quiet: no progress.
        verbose: let libraries print what they want to.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    def progress(self, message: str) -> None:
        """A line about what happens now."""
        if not self.quiet:
            print(printable(message), file=sys.stderr, flush=True)

    @contextmanager
    def training_progress(self) -> Iterator[Progress]:
        """A progress bar on a screen; a line per tenth of a phase elsewhere."""
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True, quiet=self.quiet)
        if not console.is_terminal:
            yield self._training_line
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Bar(*columns, console=console) as bar:
            phases: dict[str, Any] = {}

            def update(status: str, done: int, total: int) -> None:
                phase = status.partition(" ")[0]
                if phase not in phases:
                    phases[phase] = bar.add_task(status, total=total)
                bar.update(phases[phase], completed=done, description=status)

            yield update

    @contextmanager
    def own_warnings(self) -> Iterator[None]:
        """Print our warnings as lines of prose, and those of libraries only when verbose."""
        with warnings.catch_warnings():
            if not self.verbose:
                warnings.simplefilter("ignore")
            warnings.simplefilter("always", DkmWarning)
            show = warnings.showwarning

            def line(
                message: Warning | str, category: type[Warning], *place: Any, **more: Any
            ) -> None:
                if issubclass(category, DkmWarning):
                    print(printable(f"dkm: warning: {message}"), file=sys.stderr, flush=True)
                else:
                    show(message, category, *place, **more)

            warnings.showwarning = line
            yield

    def _training_line(self, status: str, done: int, total: int) -> None:
        if done * 10 // total > (done - 1) * 10 // total:
            self.progress(status)

    def print(self, text: str = "") -> None:
        """A line of the result: what a file says can neither end it nor control the terminal."""
        self._write(printable(text))

    def _write(self, text: str) -> None:
        """Print on stdout; when its reader is gone, as `head` goes, nobody misses it.

        A closed pipe must not end the program: its exit code is still to come.
        """
        try:
            print(text, flush=True)
        except BrokenPipeError:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 for the rest of the process

    def result(self, data: dict[str, Any]) -> None:
        """The one JSON object of ``--json``."""
        document = {"schema_version": _SCHEMA_VERSION} | data
        self._write(json.dumps(document, indent=2, allow_nan=False))

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table with numbers to the right, as wide as its content: a log has no width."""
        content = Table.of(header, [[_cell(str(value)) for value in row] for row in rows])
        cells, numeric = content.rows, content.numeric
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]

        def line(row: Sequence[str]) -> str:
            padded = (
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, numeric, strict=True)
            )
            return "  ".join(padded).rstrip()

        if title:
            self.print(title)
        self.print(line(header))
        self.print("  ".join("-" * width for width in widths))
        for row in cells:
            self.print(line(row))

    def error(self, message: str, code: int) -> None:
        """One line on stderr; with ``--json`` also an object on stdout."""
        line = printable(" ".join(message.split()))
        print(f"dkm: error: {line}", file=sys.stderr)
        if self.json:
            self.result({"error": {"message": line, "exit_code": int(code)}})


def _cell(text: str) -> str:
    """Printable, and not so long that it pads a column of thousands of rows to megabytes."""
    return printable(text if len(text) <= _WIDEST else f"{text[:_WIDEST]}...")


def size(count: int) -> str:
    """Bytes in both units: the DKM paper writes MB and means MiB."""
    return f"{count:,} B ({count / 1e6:.3f} MB, {count / 2**20:.3f} MiB)"


def ratio(whole: int, part: int) -> str:
    """How many times smaller, as ``12.3x``."""
    return f"{whole / part:.1f}x" if part else "-"
