"""Exporters, runtimes, bridges to devices and recipes are found through entry points."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dkm_export.errors import InvalidInput, Unsupported

EXPORTERS = "dkm_export.exporters"
RUNTIMES = "dkm_export.runtimes"
DEVICES = "dkm_export.devices"
RECIPES = "dkm_export.recipes"


def names_of(group: str) -> set[str]:
    """Names of all plugins of an entry point group."""
    return metadata.entry_points(group=group).names


def discover(group: str) -> dict[str, Any]:
    """Instances of all plugins of an entry point group, by name, without loading a backend.

    Raises:
        Unsupported: when one of them does not load.
    """
    entry_points = sorted(metadata.entry_points(group=group), key=lambda entry: entry.name)
    return {entry.name: _load(entry) for entry in entry_points}


def recipes() -> dict[str, Path]:
    """Files of the recipes in the packages of the entry point group, by name.

    Raises:
        Unsupported: when one of the packages does not load.
    """
    packages = [_load(entry, call=False) for entry in metadata.entry_points(group=RECIPES)]
    files = [file for package in packages for file in Path(package.__path__[0]).glob("*.toml")]
    return {file.stem: file for file in sorted(files)}


def select(plugins: dict[str, Any], names: Iterable[str], what: str) -> list[Any]:
    """The plugins of these names, each once.

    Raises:
        InvalidInput: for a name that no plugin has.
    """
    unique = list(dict.fromkeys(names))
    for name in unique:
        if name not in plugins:
            raise InvalidInput(f"no {what} '{name}': choose from {', '.join(plugins)}")
    return [plugins[name] for name in unique]


def missing_packages(packages: Iterable[str], extra: str) -> str | None:
    """Which of ``packages`` are not installed and the line that installs them, or None."""
    missing = [package for package in packages if not _installed(package)]
    if not missing:
        return None
    return f"{', '.join(missing)} not installed: pip install 'dkm-export[{extra}]'"


def _load(entry: metadata.EntryPoint, *, call: bool = True) -> Any:
    try:
        plugin = entry.load()
        return plugin() if call else plugin
    except Exception as error:  # a plugin may be anybody's
        raise Unsupported(
            f"plugin '{entry.name}' ({entry.value}) does not load: {error}: "
            "reinstall or remove its package"
        ) from error


def _installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return find_spec(package) is not None
