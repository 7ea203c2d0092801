"""Pages of measurements say what their scripts say, and README what the pages say."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import readme_tables
from benchmarks.measuring import section, write_report

PAGES = sorted(Path(readme_tables.__file__).parent.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_a_page_begins_as_its_script_has_it(page: Path) -> None:
    introduction = import_module(f"benchmarks.{page.stem}").INTRODUCTION
    assert page.read_text().partition("\n<!-- ")[0] == introduction


@pytest.mark.parametrize("marker", readme_tables.COPIED)
def test_tables_of_readme_are_those_of_the_pages(marker: str) -> None:
    copied = section(readme_tables.README.read_text(), marker).strip()
    assert copied == readme_tables.copy(*readme_tables.COPIED[marker])


def test_a_report_gets_a_new_introduction_and_keeps_its_other_sections(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_report(page, "# Old\n", "one", "1")
    write_report(page, "# Old\n", "two", "2")
    write_report(page, "# New\n", "one", "3")
    assert page.read_text() == (
        "# New\n\n<!-- one -->\n3\n<!-- end -->\n\n<!-- two -->\n2\n<!-- end -->\n"
    )
