"""Settings in TOML files, and on the command line as ``--set key=value``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from dkm_export.errors import InvalidInput


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        InvalidInput: when it is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not TOML: {error}") from error


def parse_setting(text: str) -> tuple[list[str], Any]:
    """``a.b=value`` as ``(["a", "b"], value)``; a value that is not TOML is taken as text.

    Raises:
        InvalidInput: when there is no key or no ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise InvalidInput(f"'{text}' is not a setting: write key=value")
    try:
        return key.split("."), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.split("."), value
