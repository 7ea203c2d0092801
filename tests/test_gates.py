"""What holds a check: gates in files, and the reports that a pipeline reads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
import xmlschema

from dkm_export.checking.diagnostics import FORMATS, Diagnostic, diagnostics
from dkm_export.checking.gates import ALL, Gates, GateSettings, load_gates, parse_gates
from dkm_export.checking.junit import junit_xml
from dkm_export.checking.metrics import LIMITS, compare, violations
from dkm_export.checking.report import (
    ArtifactReport,
    Check,
    Finding,
    Report,
    RuntimeReport,
    Status,
    report_schema,
)
from dkm_export.checking.runtime import NumericClass
from dkm_export.checking.summary import summary
from dkm_export.cli.main import main
from dkm_export.errors import InvalidInput

SCHEMA = xmlschema.XMLSchema(Path(__file__).parent / "data" / "junit.xsd")
# few bits each, so that what is a little larger is exact too
REFERENCE = np.random.default_rng(0).integers(-32, 32, (8, 10)).astype(np.float32)
LARGER = REFERENCE * np.float32(1 + 2**-17)


def test_a_file_sets_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "gates.toml"
    file.write_text(
        'max_drop = 1\nrequire = ["onnxruntime"]\n'
        '[max_bytes]\nall = "3.3 MB"\nonnx = 800_000\n'
        "[limits.fp32]\nsqnr_db = 90\n"
    )
    settings = load_gates(file)
    gates = Gates().changed(settings, "gates.toml")
    limits = gates.limits[NumericClass.FP32]
    assert limits.model_dump(exclude={"sources"}) == (
        LIMITS[NumericClass.FP32].model_dump(exclude={"sources"}) | {"sqnr_db": 90}
    )
    assert limits.sources == {
        "relative_l2": "built-in",
        "rtol": "built-in",
        "atol": "built-in",
        "sqnr_db": "gates.toml",
    }
    assert gates.limits[NumericClass.FP16] == LIMITS[NumericClass.FP16]
    sizes = {target: gates.size_limit(target) for target in ("onnx", "coreml")}
    assert {target: limit.value for target, limit in sizes.items() if limit} == {
        "onnx": 800_000,
        "coreml": 3_300_000,
    }
    assert (gates.max_drop and gates.max_drop.value, settings.require) == (1, ("onnxruntime",))
    # without a file nothing is held to a size
    assert Gates().size_limit("onnx") is None
    assert LIMITS[NumericClass.FP32].sqnr_db == 100


def test_later_gates_win() -> None:
    file = GateSettings(max_bytes={ALL: 10, "onnx": 20}, max_drop=1)
    one = Gates().changed(file, "file").changed(GateSettings(max_bytes={"onnx": 30}), "flag")
    found = {target: one.size_limit(target) for target in ("onnx", "coreml")}
    assert {t: (limit.value, limit.source) for t, limit in found.items() if limit} == {
        "onnx": (30, "flag"),
        "coreml": (10, "file"),
    }
    assert one.max_drop == Gates().changed(file, "file").max_drop
    every = Gates().changed(file, "file").changed(GateSettings(max_bytes={ALL: 5}), "flag")
    limit = every.size_limit("onnx")
    assert limit is not None
    assert (limit.value, limit.source) == (5, "flag")


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [
        ("3.3MB", 3_300_000),
        ("800 kB", 800_000),
        ("1GB", 10**9),
        ("1.5KiB", 1536),
        ("2 MiB", 2**21),
        ("1GiB", 2**30),
        ("12B", 12),
        ("12", 12),
        (12, 12),
        ("0.1kB", 100),
    ],
)
def test_sizes(size: object, bytes_: int) -> None:
    assert parse_gates({"max_bytes": size}, "here").max_bytes == {ALL: bytes_}


@pytest.mark.parametrize(
    "size",
    ["3.3 mb", "KB", "800KB", "-1MB", "1e6", "3,3MB", "1  MB", "", "9" * 400, "\u0661MB", "1 MB\n"],
)
def test_what_is_no_size(size: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        parse_gates({"max_bytes": {"onnx": size}}, "here")
    assert str(raised.value) == (
        f"here: 'max_bytes.onnx': '{size}' is no size: write a number of bytes, or one with a unit "
        "of B, kB, MB, GB, KiB, MiB, GiB"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_byte = 1", "'max_byte': unknown key, allowed: limits, max_bytes, max_drop, require"),
        (
            "[limits.fp32]\nl2 = 1",
            "'limits.fp32.l2': unknown key, allowed: relative_l2, rtol, atol",
        ),
        ("[limits.int8]\nrtol = 1", "should be 'fp32', 'fp32-fp16-stored' or 'fp16'"),
        ("[limits.fp32]\nrtol = '1'", "'limits.fp32.rtol': Input should be a valid number"),
        ("[limits.fp32]\nrtol = -1", "'limits.fp32.rtol': Input should be greater than or equal"),
        # an infinite limit, or one that is no number, would let everything pass
        ("[limits.fp32]\nrtol = inf", "'limits.fp32.rtol': Input should be a finite number"),
        ("[limits.fp32]\nsqnr_db = nan", "'limits.fp32.sqnr_db': Input should be a finite number"),
        ("max_drop = inf", "'max_drop': Input should be a finite number"),
        ("max_bytes = 1.5", "'max_bytes': Input should be a valid dictionary"),
        ("max_bytes = { onnx = 1.5 }", "'max_bytes.onnx': Input should be a valid integer"),
        ("require = 'onnxruntime'", "'require': Input should be a valid tuple"),
        ("max_drop =", "not TOML: "),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "gates.toml"
    file.write_text(text)
    with pytest.raises(InvalidInput) as raised:
        load_gates(file)
    assert str(raised.value).startswith(f"{file}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value).rstrip()


def test_a_violation_says_who_set_its_limit() -> None:
    settings = GateSettings.model_validate({"limits": {"fp32": {"relative_l2": 2.5e-9}}})
    limits = Gates().changed(settings, "gates.toml").limits[NumericClass.FP32]
    assert violations(compare(REFERENCE, LARGER, LIMITS[NumericClass.FP32]), limits) == [
        "relative L2 7.63e-06 exceeds 2.5e-09 (gates.toml)"
    ]
    found = violations(compare(REFERENCE, LARGER * 2, limits), limits)
    assert [line.endswith(" (gates.toml)") for line in found] == [True, False, False]


def _finding(status: Status, message: str, check: Check = "run") -> Finding:
    return Finding(check=check, status=status, message=message)


def _report(**values: Any) -> Report:
    """A failed check with every kind of finding and an output that is not finite."""
    settings = parse_gates({"max_bytes": {"onnx": 5}, "max_drop": 1}, "gates.toml")
    gates = Gates().changed(settings, "gates.toml")
    limits = gates.limits[NumericClass.FP32]
    broken = REFERENCE.copy()
    broken[0, 0] = np.nan
    artifact = ArtifactReport.model_validate(
        {
            "target": "onnx",
            "path": "onnx/a_b.onnx",
            "bytes": 9,
            "max_bytes": gates.size_limit("onnx"),
            "files": [{"path": "onnx/a_b.onnx", "bytes": 9, "sha256": "ab" * 32}],
            "findings": [_finding(Status.FAIL, "9 B, at most 5 B", "size")],
            "notes": ["ship it | as <it> is"],
        }
    )
    ran = {"target": "onnx", "numeric_class": "fp32", "limits": limits}
    runtimes = (
        RuntimeReport.model_validate(
            {
                **ran,
                "runtime": "good",
                "where": "native CPU",
                "findings": [_finding(Status.PASS, "fine")],
                "fidelity": {"logits": compare(REFERENCE, REFERENCE, limits)},
                "predictions": compare(REFERENCE, LARGER, limits),
                "metric": 97.5,
            }
        ),
        RuntimeReport.model_validate(
            {
                **ran,
                "runtime": "bad",
                "where": "emulated",
                "findings": [_finding(Status.FAIL, "logits:\n100% *wrong*", "fidelity")],
                "fidelity": {"logits": compare(REFERENCE, broken, limits)},
            }
        ),
        RuntimeReport(
            runtime="crashes",
            target="onnx",
            where="native CPU",
            findings=(_finding(Status.ERROR, "Boom: \x1b[31m"),),
        ),
        *(
            RuntimeReport(
                runtime=name,
                target="onnx",
                where="on a device",
                findings=(_finding(Status.NOT_RUN, f"no {name[:5]}"),),
            )
            for name in ("phone", "phone-gpu", "watch")
        ),
    )
    fields: dict[str, Any] = {
        "name": "a_b",
        "versions": {"dkm-export": "1", "onnx": "2"},
        "checked_with": {"dkm-export": "3", "torch": "4"},
        "machine": "Linux x86_64",
        "checkpoint_sha256": "cd" * 32,
        "fp32_bytes": 90,
        "metric_name": "top-1 %",
        "metrics": {"fp32": 98.0, "hard": 97.5},
        "max_drop": gates.max_drop,
        "reference": (_finding(Status.PASS, "2 files", "structure"),),
        "artifacts": (artifact,),
        "runtimes": runtimes,
        "required": ("watch",),
        "selected": ("onnx",),
    }
    return Report.model_validate(fields | values)


def _passed() -> Report:
    report = _report()
    artifact = report.artifacts[0].model_copy(update={"findings": (), "notes": ()})
    return _report(artifacts=(artifact,), runtimes=report.runtimes[:1], required=())


def test_the_schema_of_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["check", "--schema"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    # after a change of the report: write what report_schema() gives to report.schema.json
    assert printed == report_schema()
    schema = json.loads(printed)
    jsonschema.Draft202012Validator.check_schema(schema)
    for report in (_report(), _passed()):
        jsonschema.validate(report.to_json(), schema)
    data = _report().to_json()
    assert data["runtimes"][1]["fidelity"]["logits"]["relative_l2"] is None
    assert data["exit_code"] == 3
    for wrong in (
        data | {"exit_code": "3"},
        data | {"more": 1},
        {key: value for key, value in data.items() if key != "missing"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_junit_is_valid() -> None:
    for report in (_report(), _passed()):
        xml = junit_xml(report)
        SCHEMA.validate(xml.decode())
        root = ElementTree.fromstring(xml)
        for suite in root:
            kinds = Counter(outcome.tag for case in suite for outcome in case)
            counts = {"failure": "failures", "error": "errors", "skipped": "skipped"}
            assert suite.get("tests") == str(len(suite))
            for tag, attribute in counts.items():
                assert suite.get(attribute) == str(kinds[tag])
    for right, wrong in ((b"classname=", b"class="), (b"<failure ", b"<failed "), (b'"1"', b'"x"')):
        with pytest.raises(xmlschema.XMLSchemaValidationError):
            SCHEMA.validate(junit_xml(_report()).replace(right, wrong).decode())


def test_diagnostics_for_github() -> None:
    lines = [FORMATS["github"](line) for line in diagnostics(_report(), Path("/a,b/out"))]
    assert lines == [
        "::error file=/a%2Cb/out/onnx/a_b.onnx,title=dkm%3A onnx file%3A size"
        "::fail: 9 B, at most 5 B",
        "::error file=/a%2Cb/out/onnx/a_b.onnx,title=dkm%3A bad%3A fidelity"
        "::fail: logits:%0A100%25 *wrong*",
        "::error file=/a%2Cb/out/onnx/a_b.onnx,title=dkm%3A crashes%3A run::error: Boom: \x1b[31m",
        "::error file=/a%2Cb/out,title=dkm%3A watch%3A run::required, and did not run: no watch",
        # runtimes that nobody requires: alike ones share a line
        "::notice file=/a%2Cb/out/onnx/a_b.onnx,title=dkm%3A phone%2C phone-gpu%3A run"
        "::not_run: no phone",
        "::notice file=/a%2Cb/out/onnx/a_b.onnx,title=dkm%3A onnx file::ship it | as <it> is",
    ]
    odd = Diagnostic("note", Path("a:b"), "50%", "a\r\nb, c: 5%0A")
    assert FORMATS["github"](odd) == ("::notice file=a%3Ab,title=dkm%3A 50%25::a%0D%0Ab, c: 5%250A")


def test_diagnostics_for_xcode() -> None:
    lines = [FORMATS["xcode"](line) for line in diagnostics(_report(), Path("/a b/out"))]
    assert lines[1] == "/a b/out/onnx/a_b.onnx: error: bad: fidelity: fail: logits: 100% *wrong*"
    assert lines[3] == "/a b/out: error: watch: run: required, and did not run: no watch"
    assert lines[4] == "/a b/out/onnx/a_b.onnx: note: phone, phone-gpu: run: not_run: no phone"
    assert [line.split(": ")[1] for line in lines] == ["error"] * 4 + ["note"] * 2
    assert [FORMATS["xcode"](line) for line in diagnostics(_passed(), Path("/out"))] == [
        "/out: note: a_b: passed on good (native CPU)"
    ]


def test_no_failure_without_an_error() -> None:
    for report in (
        _report(runtimes=(), required=(), artifacts=_passed().artifacts),
        _report(runtimes=_report().runtimes[-1:], artifacts=_passed().artifacts),
        _report(runtimes=_report().runtimes[:1], artifacts=_passed().artifacts),
        _report(required=()),
    ):
        assert report.exit_code
        assert any(line.level == "error" for line in diagnostics(report, Path("out")))


def test_the_summary() -> None:
    text = summary(_report())
    lines = text.splitlines()
    assert lines[:8] == [
        r"## a\_b: failed (exit code 3)",
        "",
        "- **error** crashes, run: Boom: \N{REPLACEMENT CHARACTER}\\[31m",
        "- **fail** onnx file, size: 9 B, at most 5 B",
        r"- **fail** bad, fidelity: logits: 100% \*wrong\*",
        "- **not run** phone, phone-gpu, run: no phone",
        "- **not run** watch, run: no watch",
        "- **not done** runtime watch did not run",
    ]
    assert [line.split(" | ")[:2] for line in lines if "on a device" in line or "CPU" in line] == [
        ["| crashes", "**error**"],
        ["| phone, phone-gpu", "**not run**"],
        ["| watch", "**not run**"],
        ["| good", "pass"],
    ]
    for row in (
        r"| good | pass | native CPU | fp32 | onnx/a\_b.onnx | 7.6e-06 (≤ 1e-05) | 97.50 |",
        r"| bad | **fail** | emulated | fp32 | onnx/a\_b.onnx | not finite (≤ 1e-05) | - |",
        r"| onnx/a\_b.onnx | **fail** | 9 | 5 | 10.0x |",
        "| good | logits, samples | 0.0e+00 (≤ 1e-05) | exact (≥ 100) | 0 (≤ 0) |",
        "| good | logits, test split | 7.6e-06 (≤ 1e-05) | 102.4 (≥ 100) | 0 (≤ 0) |",
        r"| fp32 relative\_l2 | 1e-05 | built-in |",
        "| onnx bytes | 5 | gates.toml |",
        "| drop of the metric | 1 | gates.toml |",
        rf"| onnx/a\_b.onnx | 9 | {'ab' * 32} |",
        f"| checkpoint |  | {'cd' * 32} |",
        r"Made with dkm-export 1, onnx 2. Checked with dkm-export 3, torch 4 on Linux x86\_64.",
        "top-1 %: 98.00 before compression, 97.50 after, may fall by 1",
    ):
        assert row in lines, row
    assert text.endswith("</details>\n\n")
    assert summary(_passed()).startswith("## a\\_b: passed\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-bytes", "3.3mb"], "command line: 'max_bytes.all': '3.3mb' is no size: "),
        (["--max-bytes", "onnx=big"], "command line: 'max_bytes.onnx': 'big' is no size: "),
        (["--max-drop", "nan"], "command line: 'max_drop': Input should be a finite number"),
        (["--gates", "missing.toml"], "missing.toml: No such file or directory"),
        (["--format", "html"], "invalid choice: 'html'"),
        (["--format", "xcode", "--json"], "--json and --format xcode both print on stdout"),
        (["--summary", "."], "is a folder: name a file to append to"),
    ],
)
def test_wrong_options(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tmp_path), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("form", ["github", "xcode"])
def test_an_error_is_a_diagnostic_too(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tmp_path), "--format", form]) == 2
    out, err = capsys.readouterr()
    message = f"{tmp_path}: no manifest.json here or above: give the folder of `dkm export`"
    assert err == f"dkm: error: {message}\n"
    starts = {
        "github": f"::error file={tmp_path},title=dkm%3A check::",
        "xcode": f"{tmp_path}: error: check: ",
    }
    assert out == f"{starts[form]}{message}\n"
