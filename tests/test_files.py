from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dkm_export.errors import InvalidInput
from dkm_export.files import CHECKPOINT, files_below, require_replaceable, staged

Write = Callable[..., None]


def _tree(root: Path) -> dict[str, str]:
    return {str(file.relative_to(root)): file.read_text() for file in files_below(root)}


@pytest.fixture(params=[False, True], ids=["file", "folder"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Write:
    """Write a file, or a folder with one file in it, to ``sub/out``."""

    def run(text: str, *, force: bool, error: BaseException | None = None) -> None:
        with staged(tmp_path / "sub" / "out", force=force, folder=request.param) as new:
            (new / CHECKPOINT if request.param else new).write_text(text)
            if error is not None:
                raise error

    return run


def test_all_or_nothing(tmp_path: Path, write: Write) -> None:
    with pytest.raises(KeyboardInterrupt):
        write("never", force=False, error=KeyboardInterrupt())
    assert _tree(tmp_path) == {}
    write("first", force=False)
    first = _tree(tmp_path)
    with pytest.raises(InvalidInput, match="--force"):
        write("second", force=False)
    with pytest.raises(ValueError, match="interrupted"):
        write("second", force=True, error=ValueError("interrupted"))
    assert _tree(tmp_path) == first
    write("second", force=True)
    assert list(_tree(tmp_path).values()) == ["second"]


def test_an_interrupted_replacement_keeps_the_old_one(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("first", force=False)
    first, rename = _tree(tmp_path), Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write("second", force=True)
    assert _tree(tmp_path) == first


@pytest.mark.parametrize(
    ("target", "folder", "message"),
    [
        ("theirs", True, "holds more than what dkm wrote"),
        ("mixed", True, "holds more than what dkm wrote"),
        ("web", True, "holds more than what dkm wrote"),
        ("file", True, "is a file, which --force does not replace"),
        ("ours", False, "is a folder, which --force does not replace"),
        ("link", True, "is a link, which --force does not replace"),
        ("dangling", True, "is a link, which --force does not replace"),
        (".", True, "is or holds the working directory"),
        ("/", True, "is or holds the working directory"),
        ("", True, "is or holds the working directory"),
        ("ours/..", True, "is or holds the working directory"),
        ("input", True, "holds the input"),
    ],
)
def test_force_destroys_nothing_of_the_user_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, folder: bool, message: str
) -> None:
    mixed = (f"mixed/{CHECKPOINT}", "mixed/thesis.txt", "web/manifest.json")
    for name in ("theirs/precious", f"ours/{CHECKPOINT}", f"input/{CHECKPOINT}", "file", *mixed):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "input" / CHECKPOINT
    with pytest.raises(InvalidInput, match=message):
        require_replaceable(Path(target), force=True, folder=folder, sources=[source])


def test_what_appears_in_the_meantime_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def write() -> None:
        with staged(target, force=False) as new:
            new.write_text("ours")
            target.write_text("theirs")

    with pytest.raises(InvalidInput, match="exists"):
        write()
    assert _tree(tmp_path) == {"out": "theirs"}


def test_force_replaces_what_it_may(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "report.xml").write_text("")
    require_replaceable(tmp_path / "empty", force=True, folder=True)
    require_replaceable(tmp_path / "report.xml", force=True)


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below = staged(tmp_path / "file/x", force=False)
    with pytest.raises(InvalidInput, match="cannot write"), below:
        pass
