from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dkm_export import tables
from dkm_export.checking.report import read_report
from dkm_export.cli.main import main
from dkm_export.files import CHECKPOINT, METRICS
from dkm_export.palette import Layout, Palette
from dkm_export.references import TaskSource
from dkm_export.reporting import charts
from dkm_export.reporting.axes import Axis, counts, labels, signed, size, sizes
from dkm_export.reporting.content import Content, gather
from dkm_export.reporting.html import html
from dkm_export.reporting.markdown import markdown
from dkm_export.reporting.sources import read_sources
from dkm_export.reporting.weights import distribution
from tests.reports import Inputs, edit, write_inputs

HOSTILE = "</title></style><script>alert('1')</script><img src=x onerror=\"a()\">|`*_&amp;[a](b)"
STYLE = Path(__file__).parents[1] / "dkm_export" / "reporting" / "style.css"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Every name and text that someone else chooses is an attack."""

    def text(text: str) -> str:
        return f"{text}\n{HOSTILE}\x1b\u202e"

    return write_inputs(
        tmp_path_factory.mktemp("hostile"), rename=lambda name: f"{HOSTILE}.{name}", text=text
    )


def _gather(inputs: Inputs, *layers: str) -> Content:
    sources = read_sources(inputs.out, run=inputs.run, check=inputs.check, plan=inputs.plan)
    return gather(sources, layers)


class _Reader(HTMLParser):
    """The elements, attributes, texts and nesting of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes.update(attrs)
        if tag not in ("meta", "link", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def test_a_page_holds_everything_and_loads_nothing(inputs: Inputs) -> None:
    page = html(_gather(inputs))
    found = _Reader(page)
    assert not found.open
    assert not found.elements & {"script", "img", "iframe", "object", "embed", "form", "a"}
    assert {value for name, value in found.attributes if name in ("href", "src")} == {"data:,"}
    assert "url(" not in page
    assert "@import" not in page
    assert (
        "content",
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'",
    ) in found.attributes
    for text in (
        "91.50 → 90.25",
        "\N{MINUS SIGN}1.25 by palettizing",
        "failed4 runtimes ran, 2 not run",
        "Size by target",
        "Size by layer",
        "up.weight8 bits, dim 19.73\N{NO-BREAK SPACE}kB8.44 bits per weight",
        "Accuracy by epoch",
        "soft minus hard is +0.75",
        "Pareto front",
        "1 of 5 planned layers have another setting",
        "Fidelity by runtime",
        "coreml-referenceinterpreted with torch on CPU, fp16✓ pass1.0e-04 ≤ 0.01top-1 % 90.20",
        "onnxruntimenative CPU, onnxruntime 1.2, fp32✓ pass0 ≤ 1e-05",
        "onnxruntime-aarch64aarch64, emulated, onnxruntime 1.2, fp32✕ failnot finite > 1e-05",
        "not runcoreml, run: coreml says so",
        "not finite (≥ 100)",
        "Weights and centroids",
        "not the float weights from before",
        "256 of 256 centroids used; 7.74 of 8 bits of information per index",
        "Environment and hashes",
        "dkm-export0.1",
        "samples.safetensors724baa7a731ce04b431af93d94cba8e0160a0e6a4607edc2d70c595dd098e56cf",
    ):
        assert text in found.text, text


def test_what_was_not_given_is_not_claimed(inputs: Inputs) -> None:
    content = gather(read_sources(inputs.run))
    missing = {entry.what: entry.how for entry in content.missing}
    assert missing == {
        "sizes of artifacts": "give the folder of `dkm export` instead of the run's",
        "not checked": "`--check FILE` adds what runtimes computed",
        "Pareto front": "`--plan FILE` adds what `dkm plan --json` printed",
    }
    page, text = _Reader(html(content)).text, markdown(content)
    for title in ("Pareto front", "Fidelity by runtime"):
        assert f"## {title}" not in text
    assert "Fidelity" not in page
    assert "Accuracy by epoch" in page
    assert "Checksnot checked" in page
    assert "Not checked: --check FILE adds what runtimes computed" in page
    assert "- not checked: `--check FILE` adds what runtimes computed\n" in text
    assert "**Not checked.**" in text
    plain = gather(read_sources(inputs.out))
    assert plain.missing[0].how == "`--run RUN` adds what the training measured"
    assert "Accuracy by epoch:" in _Reader(html(plain)).text


def test_a_check_of_one_artifact_is_no_check_of_all(inputs: Inputs, tmp_path: Path) -> None:
    content = gather(read_sources(inputs.out, check=_check_of(inputs, tmp_path, "onnx")))
    assert [target.checked for target in content.targets] == [None, "pass"]
    assert "not checked: coreml/a_b.coreml" in {entry.what for entry in content.missing}
    assert "| coreml | coreml/a\\_b.coreml | 12,000 | 5.6x | - | **not checked** |" in markdown(
        content
    )


def test_a_passing_file_with_a_failing_runtime_has_no_passing_status(inputs: Inputs) -> None:
    content = _gather(inputs)
    page, text = html(content), markdown(content)
    assert "| what | file | bytes | ratio to fp32 | at most | file and size |\n" in text
    assert "| onnx | onnx/a\\_b.onnx | 8,000 | 8.4x | - | pass |\n" in text
    assert "| onnxruntime-aarch64 | **fail** | aarch64, emulated, " in text
    sizes = page[page.index("Every byte count") :].partition("</table>")[0]
    assert ">file and size<" in sizes
    assert ">status<" not in sizes
    assert sizes.count('class="badge pass"') == 2


def test_nothing_in_a_file_becomes_markup(hostile: Inputs) -> None:
    content = _gather(hostile)
    page, text = html(content), markdown(content)
    found = _Reader(page)
    assert not found.open
    assert not found.elements & {"script", "img"}
    assert not {name for name, _ in found.attributes if name.startswith("on")}
    # layers in a bar, a table and a plot; each text of the check somewhere
    assert found.text.count(f"{HOSTILE}.up.weight") >= 3
    for word in (
        "native CPU",
        "onnxruntime 1.2",
        "256 inputs",
        "coreml says so",
        "ship it",
        "torch",
    ):
        assert f"{word}\n{HOSTILE}\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}" in found.text
    assert "top-1 %" in text
    for written in (page, text):
        assert "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}" in written
        assert not re.search("[\x1b\u202e]", written)
    assert not re.search(r"(?<!\\)<(?!/?(details|summary)>)", text)
    assert not re.search(r"(?<!\\)(\[a|&amp;)", text)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) > 10
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_same_inputs_same_bytes(inputs: Inputs, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(inputs.run.parent, elsewhere)
    moved = Inputs(
        *(elsewhere / x.name for x in (inputs.run, inputs.out, inputs.check, inputs.plan))
    )
    for write in (html, markdown):
        text = write(_gather(inputs))
        assert text == write(_gather(moved))
        assert str(inputs.run.parent) not in text


def test_the_verb(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, text = tmp_path / "new" / "report.html", tmp_path / "report.md"
    assert main(["report", *inputs.arguments, "-o", str(page), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["output"] == str(page)
    assert result["bytes"] == page.stat().st_size
    assert result["missing"] == {}
    assert page.read_text(encoding="utf-8") == html(_gather(inputs))
    assert main(["report", str(inputs.out), "-o", str(text), "--layer", "up.*"]) == 0
    assert "not in it: not checked: `--check FILE` adds" in capsys.readouterr().out
    assert text.read_text(encoding="utf-8").count("centroids used;") == 1
    assert main(["report", str(inputs.out), "-o", str(text)]) == 2
    assert "exists: name another output or pass --force" in capsys.readouterr().err
    assert main(["report", str(inputs.out), "-o", str(text), "--force"]) == 0


def test_a_path_in_a_manifest_does_not_control_the_terminal(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(inputs.out, out)
    path = "onnx/\x1b[2Ja\nreport: all passed"
    edit(out / "manifest.json", lambda data: data["artifacts"][1].update(path=path))
    file = _check_of(inputs, tmp_path, "coreml")
    assert main(["report", str(out), "--check", str(file), "-o", str(tmp_path / "r.md")]) == 0
    assert "not in it: not checked: onnx/?[2Ja?report: all passed: " in capsys.readouterr().out


def _check_of(inputs: Inputs, folder: Path, target: str) -> Path:
    """The check of one artifact alone."""
    report = read_report(inputs.check)
    parts = {
        key: tuple(x for x in getattr(report, key) if x.target == target)
        for key in ("artifacts", "runtimes")
    }
    file = folder / "check.json"
    file.write_text(json.dumps(report.model_copy(update=parts).to_json()))
    return file


def test_files_that_changed_are_said_to_have(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(inputs.out, out)
    (out / "onnx" / "a_b.onnx").write_bytes(b"other")
    (out / "samples.safetensors").unlink()
    states = {file.path: file.state for file in gather(read_sources(out)).files}
    assert states == {
        CHECKPOINT: "read for this report",
        "samples.safetensors": "missing",
        "coreml/a_b.coreml": "as exported",
        "onnx/a_b.onnx": "changed since the export",
    }
    about = "as it is now; of one that is missing, or was not read, as it was recorded"
    assert about in _Reader(html(gather(read_sources(out)))).text


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (None, "the model has no task"),
        (TaskSource(factory="a:b"), "the task was not evaluated when the model was compressed"),
    ],
)
def test_why_there_is_no_metric(task: TaskSource | None, reason: str, inputs: Inputs) -> None:
    content = _gather(inputs)
    source = content.model.source.model_copy(update={"task": task})
    content = replace(content, model=replace(content.model, source=source), hard=None)
    assert f"Metricnot measured{reason}" in _Reader(html(content)).text


def test_a_run_without_metrics_or_epochs(inputs: Inputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(inputs.run, run)
    edit(run / METRICS, lambda data: data.update(epochs=[]))
    assert "no epochs of DKM training" in _Reader(html(gather(read_sources(run)))).text
    (run / METRICS).unlink()
    content = gather(read_sources(run))
    assert content.missing[0].how == (
        "the run's folder has no `metrics.json` with what the training measured"
    )
    assert "91.50 → 90.25" in html(content)


def test_weights_are_counted_by_centroid() -> None:
    lut = np.array([[[-1], [0.5], [2], [7]], [[0], [1], [3], [4]]], np.float16)
    indices = np.array([[0, 0, 1, 2], [3, 3, 3, 3]], np.uint8)
    found = distribution("a", Palette(2, Layout((2, 4), groups=2), lut, indices))
    assert [(x.values[0], x.count) for x in found.centroids] == [
        *((-1, 2), (0, 0), (0.5, 1), (1, 0), (2, 1), (3, 0), (4, 4), (7, 0))
    ]
    assert (found.used, found.total) == (4, 8)
    assert found.entropy == pytest.approx((1.5 + 0) / 2)
    assert sum(found.bins) == 8
    assert (found.edges[0], found.edges[-1]) == (-1, 4)


def test_a_centroid_beyond_all_weights_has_its_tick_in_the_picture() -> None:
    drawn = charts.bins([-1, 1.5, 4], [3, 5], [-1.5, 0, 7], "weights")
    ticks = [float(x) for x in re.findall(r'<line x1="([-0-9.]+)"[^>]*class="rug"', str(drawn))]
    bars = [float(x) for x in re.findall(r'<rect x="([-0-9.]+)"', str(drawn))]
    assert len(ticks) == 3
    width = re.search(r'viewBox="0 0 (\d+) ', str(drawn))
    assert width
    assert 0 < min(ticks) < min(bars) < max(ticks) < int(width[1])


def test_markdown_makes_nothing_of_names() -> None:
    assert tables.markdown("# $x$ www.a.b https://c:1") == r"\# \$x\$ www\.a.b https\://c:1"


def test_weights_of_vectors_leave_padding_out() -> None:
    lut = np.array([[[1, 2], [3, 4]]], np.float16)
    found = distribution("a", Palette(1, Layout((3,), dim=2), lut, np.array([0, 1], np.uint8)))
    assert [(x.values, x.count) for x in found.centroids] == [((1, 2), 1), ((3, 4), 1)]
    assert sum(found.bins) == 3


def test_axes_name_round_values() -> None:
    assert labels(Axis(98.53, 99.51, 0, 1).ticks(5)) == ["98.6", "98.8", "99.0", "99.2", "99.4"]
    log = Axis.around([2e3, 3e5], 0, 100, may_be_log=True)
    assert log.log
    assert sizes(log.ticks(3)) == [f"{n}\N{NO-BREAK SPACE}kB" for n in (10, 100)]
    assert log.at(2e3) < 10 < 90 < log.at(3e5) < 100
    assert not Axis.around([0.0, 3e5], 0, 1, may_be_log=True).log
    assert counts([0, 950, 1500, 2e6]) == ["0", "950", "1.5k", "2M"]
    assert [size(x) for x in (0, 12, 999, 999.9, 84_010, 1_168_968)] == [
        f"{text}".replace(" ", "\N{NO-BREAK SPACE}")
        for text in ("0 B", "12 B", "999 B", "1.00 kB", "84.0 kB", "1.17 MB")
    ]
    assert [signed(x, "+.2f") for x in (-0.001, 0.0, 1)] == ["0.00", "0.00", "+1.00"]
    assert signed(-1, "g") == "\N{MINUS SIGN}1"
    for low, high in ((5e-324, 1e-323), (-1.7e308, 1.7e308), (3.0, 3.0), (0.0, 0.0)):
        axis = Axis.around([low, high], 0, 1, may_be_log=True)
        assert all(np.isfinite(axis.at(x)) for x in (low, high, *axis.ticks(5)))


def _luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_are_told_apart(scheme: int) -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for what figures are drawn with."""
    block = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)[scheme]
    colors = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
    pairs = [(name, "paper", 4.5) for name in ("ink", "muted", "good", "bad")]
    pairs += [(name, f"{name}-back", 4.5) for name in ("good", "bad", "idle")]
    pairs += [(name, "paper", 3) for name in ("blue", "orange", "grey", "axis")]
    for front, back, least in pairs:
        light, dark = sorted((_luminance(colors[x]) for x in (front, back)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, (front, back)
