"""A folder as bytes: what ExecuTorch's Core ML delegate is given, ``inmemoryfs`` in its source.

The files stand one after the other; a JSON object with their names and places, in reverse, ends it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from dkm_export.errors import InvalidInput

_ROOT: Final = "lowered_module"
_FILE, _FOLDER = 0, 1
_LONGEST_INDEX: Final = 1 << 20
"""Bytes of the JSON; a package has a handful of files."""


def pack_folder(files: Mapping[str, bytes]) -> bytes:
    """The bytes for files by their path in the folder, in the order in which they are given."""
    nodes: list[dict[str, Any]] = []
    content = bytearray()

    def add(name: str, entry: bytes | dict[str, Any]) -> int:
        start, children = len(content), {}
        if isinstance(entry, bytes):
            content.extend(entry)
        else:
            children = {child: add(child, item) for child, item in entry.items()}
        kind, size = (_FILE, len(entry)) if isinstance(entry, bytes) else (_FOLDER, 0)
        region = {"offset": start if kind == _FILE else 0, "size": size}
        nodes.append({"children": children, "dataRegion": region, "kind": kind, "name": name})
        return len(nodes) - 1

    add(_ROOT, _tree(files))
    index = json.dumps({"nodes": nodes}, separators=(",", ":")).encode()
    return bytes(content) + index[::-1]


def unpack_folder(data: bytes) -> dict[str, bytes]:
    """The files in a folder, by path.

    They take no more memory than ``data`` and no path leaves the folder, whatever it says.

    Raises:
        InvalidInput: when it is malformed.
    """
    try:
        text = data[: -_LONGEST_INDEX - 1 : -1].decode("latin-1").lstrip("\0")
        index, _ = json.JSONDecoder().raw_decode(text)
        nodes = index["nodes"]
        files = dict(_files(nodes, len(nodes) - 1, "", set()))
        if sum(size for _, size in files.values()) > len(data):
            raise ValueError("files share their bytes")
        return {path: _cut(data, *region) for path, region in files.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInput("the folder for Core ML is malformed") from error


def _tree(files: Mapping[str, bytes]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, content in files.items():
        *parents, name = path.split("/")
        folder = root
        for parent in parents:
            folder = folder.setdefault(parent, {})
        folder[name] = content
    return root


def _files(
    nodes: list[Any], index: int, path: str, seen: set[int]
) -> list[tuple[str, tuple[int, int]]]:
    """Path and place of each file at or below a node, each of which is there once."""
    if index in seen or not 0 <= index < len(nodes):
        raise ValueError("a node that is twice in the folder, or is not there")
    seen.add(index)
    node = nodes[index]
    if node["kind"] == _FILE:
        return [(path, (node["dataRegion"]["offset"], node["dataRegion"]["size"]))]
    found = []
    for name, child in node["children"].items():
        if not name.isprintable() or "/" in name or "\\" in name or name in ("", ".", ".."):
            raise ValueError("a name that is no file's")
        if nodes[child]["name"] != name:
            raise ValueError("a file with two names")
        found += _files(nodes, child, f"{path}/{name}" if path else name, seen)
    return found


def _cut(data: bytes, offset: int, size: int) -> bytes:
    if min(offset, size) < 0 or offset + size > len(data):
        raise ValueError("a file that ends after the folder")
    return data[offset : offset + size]
