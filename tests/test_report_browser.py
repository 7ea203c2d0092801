"""Reports in a real browser: nothing to load, nothing to complain of, nothing beside the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dkm_export.cli.main import main
from tests.browser import Page, browser, find_browser
from tests.reports import write_inputs

LONG = "https://example.com/a/text/that/is/long/and/has/no/space/to/break/its/line/at"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium-headless-shell")
    with browser(program, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of everything, one of a run alone, and one of names that want to do harm."""
    folder = tmp_path_factory.mktemp("reports")
    (folder / "plain").mkdir()
    (folder / "hostile").mkdir()
    plain = write_inputs(folder / "plain")
    hostile = write_inputs(
        folder / "hostile",
        rename=lambda name: f"<script>document.title='owned'</script><img src={LONG}>.{name}",
        text=lambda text: f"{text} <img src={LONG} onerror=\"document.title='owned'\">",
    )
    arguments = {
        "everything": plain.arguments,
        "run": [str(plain.run)],
        "hostile": hostile.arguments,
    }
    for name, given in arguments.items():
        assert main(["report", *given, "-o", str(folder / f"{name}.html"), "-q"]) == 0
    return {name: folder / f"{name}.html" for name in arguments}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 700, 360])
@pytest.mark.parametrize("name", ["everything", "run", "hostile"])
def test_a_report_in_a_browser(
    name: str, width: int, scheme: str, page: Page, reports: dict[str, Path], tmp_path: Path
) -> None:
    page.open(reports[name], width=width, scheme=scheme)
    # what is folded has to fit as well
    page.evaluate("document.querySelectorAll('details').forEach(x => x.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.title") == "convolutions: palettization report"
    page.screenshot(tmp_path / f"{name}-{width}-{scheme}.png")
    assert page.messages == []
    assert page.requests == [reports[name].as_uri()]
    paper = "rgb(253, 252, 250)" if scheme == "light" else "rgb(20, 23, 26)"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    # one of each pair of figures, in letters that a phone's owner can read
    heights = page.evaluate(
        "[...document.querySelectorAll('.chart text')].filter(x => x.getClientRects().length)"
        ".map(x => parseFloat(getComputedStyle(x).fontSize) * x.getScreenCTM().a)"
    )
    assert heights
    assert min(heights) >= 10
    shown = "[...document.querySelectorAll('.chart')].filter(x => x.getClientRects().length).length"
    plots = page.evaluate("document.querySelectorAll('.plots .chart').length")
    assert plots == 4
    assert page.evaluate(shown) == plots + (1 if name == "run" else 2)


def test_a_browser_sees_what_is_wrong(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    policy = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\">"
    file.write_text(
        f"<!doctype html><script>console.error('here')</script>{policy}<img src=refused.png>"
    )
    page.open(file, width=360, scheme="light")
    assert any("here" in message for message in page.messages)
    assert any("Content Security Policy" in message for message in page.messages)
    file.write_text("<!doctype html><img src=gone.png><div style='width:999px'>wide</div>")
    page.open(file, width=360, scheme="light")
    assert [address.rpartition("/")[2] for address in page.requests] == ["bad.html", "gone.png"]
    assert page.evaluate("document.documentElement.scrollWidth") > 360
