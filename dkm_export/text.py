"""Text from files, before it reaches a terminal or a page: it may hold anything."""

from __future__ import annotations

import re

# control characters, and those that would turn the order of the text around
_HIDDEN = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text for one line of a terminal, or of a log."""
    return "".join(character if character.isprintable() else "?" for character in text)


def visible(text: str) -> str:
    """The text for a page: spaces and line breaks of all kinds stay."""
    return _HIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
