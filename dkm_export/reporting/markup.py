"""HTML and SVG made of elements: every text is escaped unless an element made it."""

from __future__ import annotations

import html
from collections.abc import Iterable

from dkm_export.text import visible

_VOID = {"br", "link", "meta", "wbr"}


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | float | None
"""What an element holds: markup as it is, anything else escaped; None is left out."""


def tag(name: str, /, *children: Child | Iterable[Child], **attributes: object) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: markup, texts, numbers, or iterables of them.
        attributes: ``class_`` is written as ``class`` and ``stroke_width`` as ``stroke-width``;
            those that are None are left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{together(*children)}</{name}>")


def together(*children: Child | Iterable[Child]) -> Markup:
    """Children one after another."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str | float | int):
            parts.append(_text(child))
        elif child is not None:
            parts.append(together(*child))
    return Markup("".join(parts))


def _text(value: object) -> str:
    if isinstance(value, float):
        # tenths of a pixel are enough, and short
        value = f"{value:.1f}".removesuffix(".0")
    return html.escape(visible(str(value)))
