"""Writing results: all or nothing, and never over something that is there."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dkm_export.errors import InvalidInput


@contextmanager
def staged(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield a path beside ``target`` to write a file or folder to; move it there at the end.

    When the body raises, nothing is left behind and an earlier ``target`` is untouched.

    Raises:
        InvalidInput: when ``target`` exists and ``force`` is false, or its folder is not writable.
    """
    require_absent(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InvalidInput(f"cannot write {target}: {error.strerror}") from error
    try:
        new, old = folder / "new", folder / "old"
        yield new
        if target.is_dir():
            # A folder cannot be replaced in one step: keep the old one until the new one stands.
            target.rename(old)
            try:
                new.rename(target)
            except OSError:
                old.rename(target)
                raise
        else:
            new.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_absent(target: Path, *, force: bool) -> None:
    """Refuse to write over ``target``; long work asks before it starts.

    Raises:
        InvalidInput: when ``target`` exists and ``force`` is false.
    """
    if target.exists() and not force:
        raise InvalidInput(f"{target} exists: name another output or pass --force")


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_below(path: Path) -> list[Path]:
    """The file itself, or all regular files below a folder, sorted."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
