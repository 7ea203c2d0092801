"""Pydantic's findings as one line for the user."""

from __future__ import annotations

from pydantic import ValidationError


def explain(error: ValidationError) -> str:
    """The first finding: the key's full path, what is wrong, and how many more there are."""
    first, *rest = error.errors(include_url=False)
    key = ".".join(str(part) for part in first["loc"]) or "the whole"
    message = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
    more = f" (and {len(rest)} more problems)" if rest else ""
    return f"'{key}': {message.removeprefix('Value error, ')}{more}"
