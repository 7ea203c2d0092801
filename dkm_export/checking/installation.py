"""What a runtime downloads on request: a folder in the user's cache, whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dkm_export.errors import Unsupported
from dkm_export.files import files_below, put_in_place

_RECEIPT = "dkm-export.json"


@dataclass(frozen=True)
class Installation:
    """The files of one version of one runtime, below the user's cache folder.

    Attributes:
        name: of the runtime.
        version: what is installed; another version has another folder.
    """

    name: str
    version: str

    @property
    def folder(self) -> Path:
        """Where the files are, or would be."""
        return _cache() / self.name / self.version

    def problem(self) -> str | None:
        """Why the files cannot be used, or None.

        The sizes of all files are compared with those right after the download, which finds what a
        full disk or a cleaner of caches left; their hashes were the downloader's to verify.
        """
        try:
            sizes = dict(json.loads((self.folder / _RECEIPT).read_bytes()))
        except (OSError, TypeError, ValueError):
            return "damaged" if self.folder.exists() else "not installed"
        for name, size in sizes.items():
            file = self.folder / name
            if not file.is_file() or file.stat().st_size != size:
                return f"damaged at {file}"
        return None

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """Yield an empty folder to fill, which replaces the installation at the end.

        When the body raises, nothing is left of it.

        Raises:
            Unsupported: when the cache cannot be written.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", dir=self.folder.parent) as beside:
                new = Path(beside, "new")
                new.mkdir()
                yield new
                files = {str(file.relative_to(new)): file for file in files_below(new)}
                sizes = {name: file.stat().st_size for name, file in files.items()}
                (new / _RECEIPT).write_text(json.dumps(sizes))
                put_in_place(new, self.folder, Path(beside, "old"))
        except OSError as error:
            raise Unsupported(
                f"{self.name}: cannot write {self.folder.parent}: {error.strerror}: make room, or "
                "set XDG_CACHE_HOME to another folder"
            ) from error

    def remove(self) -> bool:
        """Delete all versions, and what a killed download left; returns whether there was any."""
        folder = self.folder.parent
        found = folder.exists()
        if found:
            shutil.rmtree(folder)
        return found


def _cache() -> Path:
    """This tool's cache folder, by the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the specification: a relative path is to be ignored
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "dkm-export"
