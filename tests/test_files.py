from __future__ import annotations

from pathlib import Path

import pytest

from dkm_export.errors import InvalidInput
from dkm_export.files import files_below, staged


def _tree(root: Path) -> dict[str, str]:
    return {str(file.relative_to(root)): file.read_text() for file in files_below(root)}


@pytest.mark.parametrize("folder", [False, True])
def test_all_or_nothing(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "sub" / "out"

    def write(text: str, *, force: bool, fail: bool = False) -> None:
        with staged(target, force=force) as new:
            if folder:
                new.mkdir()
                (new / "a").write_text(text)
            else:
                new.write_text(text)
            if fail:
                raise ValueError("interrupted")

    with pytest.raises(ValueError, match="interrupted"):
        write("never", force=False, fail=True)
    assert _tree(tmp_path) == {}
    write("first", force=False)
    first = _tree(tmp_path)
    with pytest.raises(InvalidInput, match="--force"):
        write("second", force=False)
    with pytest.raises(ValueError, match="interrupted"):
        write("second", force=True, fail=True)
    assert _tree(tmp_path) == first
    write("second", force=True)
    assert list(_tree(tmp_path).values()) == ["second"]


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InvalidInput, match="cannot write"),
        staged(tmp_path / "file/x", force=False),
    ):
        pass
