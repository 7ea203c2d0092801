"""The parts that the sections of an HTML report are built of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dkm_export.reporting.drawing import glyph
from dkm_export.reporting.markup import Child, Markup, tag, together
from dkm_export.tables import STATUSES, Table

_KINDS = {"sha256": "hash", "file": "path"}
"""How columns of these names are set."""

_GLYPHS = {"pass": "\u2713", "fail": "\u2715", "error": "!"}


@dataclass(frozen=True)
class Bar:
    """One row of bars.

    Attributes:
        name: what it is of.
        note: more about it.
        parts: style and length of each piece, one after another.
        value: in words.
        value_note: more about the value.
    """

    name: str
    note: str
    parts: tuple[tuple[str, int], ...]
    value: str
    value_note: str = ""

    @property
    def length(self) -> int:
        """All pieces together."""
        return sum(length for _, length in self.parts)


def section(title: str, about: Iterable[Child], parts: Iterable[Child]) -> Markup:
    """A heading, what is to be known of it, and its content."""
    words = [tag("p", text) for text in about]
    heading = tag("div", tag("h2", title), words, class_="about")
    return tag("section", heading, tag("div", parts, class_="body"))


def prose(text: str) -> Markup:
    """A sentence of ours with code in backticks; a text from a file may have others."""
    return together(tag("code", x) if i % 2 else x for i, x in enumerate(text.split("`")))


def table(content: Table, label: str) -> Markup:
    """A table that scrolls inside of the page."""
    numeric = content.numeric
    kinds = [
        _KINDS.get(name, "number" if number else None)
        for name, number in zip(content.header, numeric, strict=True)
    ]
    head = [
        tag("th", name, class_=kind, scope="col")
        for name, kind in zip(content.header, kinds, strict=True)
    ]
    rows = []
    for row in content.rows:
        cells = zip(content.header, row, kinds, strict=True)
        rows.append(
            tag(
                "tr",
                [tag("td", _cell(name, x), class_=kind) for name, x, kind in cells],
            )
        )
    whole = tag("table", tag("thead", tag("tr", head)), tag("tbody", rows))
    # can be focused, so that keys scroll it
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=label)


def fold(label: str, content: Table) -> Markup | None:
    """A table that a click shows."""
    if not content.rows:
        return None
    return tag("details", tag("summary", label), table(content, label))


def bars(rows: Sequence[Bar], label: str) -> Markup:
    """Bars of one scale, with their numbers."""
    most = max((bar.length for bar in rows), default=0) or 1
    lines = []
    for bar in rows:
        pieces = [
            tag("i", class_=style, style=f"width:{100 * length / most:.2f}%")
            for style, length in bar.parts
            if length
        ]
        lines.append(
            tag(
                "tr",
                tag("th", bar.name, _small(bar.note), class_="name", scope="row"),
                tag("td", tag("div", pieces, class_="track", aria_hidden="true"), class_="figure"),
                tag("td", bar.value, _small(bar.value_note), class_="value"),
            )
        )
    return tag("table", tag("tbody", lines), class_="bars", aria_label=label)


def legend(entries: Iterable[tuple[str, str]], *, swatches: bool = False) -> Markup:
    """Styles and what they mean."""
    lines = []
    for style, text in entries:
        sample = tag("span", class_=f"swatch {style}") if swatches else glyph(style)
        lines.append(tag("li", sample, text))
    return tag("ul", lines, class_="legend")


def status(text: str) -> Markup:
    """The outcome of a check: a word, a sign and a colour."""
    if text == "-":
        return Markup("-")
    sign = _GLYPHS.get(text)
    shown = tag("span", f"{sign} ", aria_hidden="true") if sign else None
    return tag("span", shown, text, class_=f"badge {text.replace(' ', '-')}")


def notes(lines: Iterable[tuple[str, str]]) -> Markup:
    """Statuses with a text each."""
    items = [tag("li", status(word), tag("span", text)) for word, text in lines]
    return tag("ul", items, class_="notes")


def _cell(name: str, text: str) -> Markup:
    if name in STATUSES:
        return status(text)
    if name == "file":
        return _breaking(text, "/")
    if name == "sha256":
        return together(text[:32], tag("br"), text[32:])
    return together(text)


def _breaking(text: str, after: str) -> Markup:
    """Text whose line may end after a sign."""
    first, *rest = text.split(after)
    return together(first, (together(after, tag("wbr"), part) for part in rest))


def _small(text: str) -> Markup | None:
    return tag("small", text) if text else None
