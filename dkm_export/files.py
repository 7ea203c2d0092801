"""Writing results: all or nothing, and never over something that is not ours to replace."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dkm_export.errors import InvalidInput
from dkm_export.plugins import EXPORTERS, names_of

# Names of the files in the folders that this tool writes: a run's, an export's, a device test's.
CHECKPOINT = "model.dkm.safetensors"
METRICS = "metrics.json"
MANIFEST = "manifest.json"
SAMPLES = "samples.safetensors"
DEVICE_TEST = "device_test.json"


@contextmanager
def staged(
    target: Path, *, force: bool, folder: bool = False, sources: Sequence[Path] = ()
) -> Iterator[Path]:
    """Yield a path beside ``target`` to write to; move it there at the end.

    When the body raises, nothing is left behind and an earlier ``target`` is untouched.

    Args:
        target: file or folder to make.
        force: replace an earlier one, see `require_replaceable`.
        folder: whether it is a folder, which then exists and is empty.
        sources: the inputs, which must not lie in ``target``.

    Raises:
        InvalidInput: when ``target`` may not be replaced, or its folder is not writable.
    """
    require_replaceable(target, force=force, folder=folder, sources=sources)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InvalidInput(f"cannot write {target}: {error.strerror}") from error
    new, old = beside / "new", beside / "old"
    try:
        if folder:
            new.mkdir()
        yield new
        # Something may have appeared there in the meantime.
        require_replaceable(target, force=force, folder=folder, sources=sources)
        put_in_place(new, target, old)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def put_in_place(new: Path, target: Path, old: Path) -> None:
    """Rename ``new`` to ``target``, and what is there to ``old``; all on one file system."""
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        # A folder cannot be replaced in one step: not even Ctrl-C may lose the old one.
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def require_replaceable(
    target: Path, *, force: bool, folder: bool = False, sources: Sequence[Path] = ()
) -> None:
    """Refuse an output that would destroy something; long work asks before it starts.

    With ``force``, a file replaces a file, and a folder replaces an empty one or one that this
    tool wrote.

    Args:
        target: the output.
        force: whether the user wants an earlier one to be replaced.
        folder: whether the output is a folder.
        sources: the inputs, which must not lie in the output.

    Raises:
        InvalidInput: with the reason and the way out.
    """
    place = target.resolve()
    if Path.cwd().is_relative_to(place):
        raise InvalidInput(f"'{target}' is or holds the working directory: name a folder below it")
    for source in sources:
        if source.resolve().is_relative_to(place):
            raise InvalidInput(f"{target} holds the input {source}: name another output")
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise InvalidInput(f"{target} exists: name another output or pass --force")
    if target.is_symlink() or target.is_dir() != folder:
        kind = "link" if target.is_symlink() else "folder" if target.is_dir() else "file"
        raise InvalidInput(f"{target} is a {kind}, which --force does not replace: remove it first")
    names = {entry.name for entry in target.iterdir()} if folder else set()
    ours = {CHECKPOINT, METRICS, MANIFEST, SAMPLES, DEVICE_TEST, *names_of(EXPORTERS)}
    if names and not (names <= ours and names & {CHECKPOINT, DEVICE_TEST}):
        raise InvalidInput(
            f"{target} holds more than what dkm wrote, which --force does not replace: "
            "remove it first"
        )


def require_inside(path: Path, files: Iterable[Path]) -> None:
    """Refuse links out of a folder: what they lead to is none of its files.

    Args:
        path: the folder, or a file in it, which itself may be a link.
        files: that have to be in it.

    Raises:
        InvalidInput: naming the first that is not.
    """
    folder = (path if path.is_dir() else path.parent).resolve()
    for file in files:
        if file != path and not file.resolve().is_relative_to(folder):
            raise InvalidInput(f"{path}: '{file.name}' leads out of its folder: remove it")


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_below(path: Path) -> list[Path]:
    """The file itself, or all regular files below a folder, sorted."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
