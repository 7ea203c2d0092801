from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest

from dkm_export.checking.execution import _check_controls
from dkm_export.checking.junit import junit_xml
from dkm_export.checking.metrics import LIMITS, agreement, compare, sensitivity, violations
from dkm_export.checking.report import ArtifactReport, Finding, Report, RuntimeReport, Status
from dkm_export.checking.runtime import NumericClass
from dkm_export.cli.check import _print
from dkm_export.cli.terminal import Terminal
from dkm_export.errors import ExitCode

Array = npt.NDArray[Any]
FP32 = LIMITS[NumericClass.FP32]
REFERENCE = np.random.default_rng(0).normal(size=(8, 10)).astype(np.float32)


def test_an_exact_output_has_no_violations() -> None:
    fidelity = compare(REFERENCE, REFERENCE.copy(), FP32)
    assert (fidelity.max_abs, fidelity.relative_l2, fidelity.sqnr_db) == (0, 0, None)
    assert fidelity.cosine == pytest.approx(1)
    assert violations(fidelity, FP32) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [(1e-3, "relative L2"), (np.nan, "1 elements are NaN"), (np.inf, "1 elements are NaN")],
)
def test_a_wrong_element_is_a_violation(error: float, message: str) -> None:
    output = REFERENCE.copy()
    output[3, 3] += error
    assert message in violations(compare(REFERENCE, output, FP32), FP32)[0]


def test_figures_are_what_they_say() -> None:
    fidelity = compare(np.array([3.0, 4.0]), np.array([3.0, 4.5]), FP32)
    assert fidelity.max_abs == 0.5
    assert fidelity.relative_l2 == pytest.approx(0.1)
    assert fidelity.sqnr_db == pytest.approx(20)
    assert fidelity.outside == 1


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_norm_beyond_float64_hides_no_error() -> None:
    large = np.array([1e200, 1.0])
    for wrong in (np.array([1e200, 1e100]), -large):
        found = compare(large, wrong, FP32)
        assert (found.relative_l2, found.cosine) == (np.inf, 0)
    assert compare(large, large, FP32).relative_l2 == 0


def test_predictions_may_differ_only_in_ties() -> None:
    reference = np.array([[1.0, 0.0], [1.0, 1.0 - 1e-7]])
    swapped = reference[:, ::-1]
    found = agreement(reference, swapped, FP32)
    assert found is not None
    assert (found.differing, found.ties) == (1, 1)
    assert agreement(np.zeros((4, 1)), np.zeros((4, 1)), FP32) is None


def test_a_large_row_hides_no_wrong_prediction_in_another() -> None:
    reference = np.array([[1000.0, 0.0], [1.0, 0.9]])
    output = reference.copy()
    output[1] = [0.9, 1.0]
    found = agreement(reference, output, FP32)
    assert found is not None
    assert (found.differing, found.ties) == (1, 0)


def test_nothing_agrees_with_a_reference_that_is_not_finite() -> None:
    for value in (np.nan, np.inf):
        broken = REFERENCE.copy()
        broken[0, 0] = value
        assert violations(compare(broken, REFERENCE, FP32), FP32)
        assert violations(compare(broken, broken, FP32), FP32)
    found = agreement(REFERENCE, np.full_like(REFERENCE, np.nan), FP32)
    assert found is not None
    assert found.differing == len(REFERENCE)


def test_sensitivity_sees_constant_outputs() -> None:
    assert sensitivity(np.ones((8, 3))) == 0
    assert sensitivity(np.zeros((8, 3))) == 0
    assert sensitivity(REFERENCE) > 0.9


def _report(status: Status, ran: Status = Status.PASS, **values: object) -> Report:
    finding = Finding(check="structure", status=status, message="a <message> & more\x1b")
    run = Finding(check="run", status=ran, message="why")
    artifact = ArtifactReport(target="onnx", path="onnx/a.onnx", bytes=1, findings=(finding,))
    runtime = RuntimeReport(runtime="ort", target="onnx", where="here", findings=(run,))
    fields: dict[str, object] = {
        "name": "a",
        "versions": {},
        "checked_with": {},
        "machine": "here",
        "checkpoint_sha256": "",
        "fp32_bytes": 1,
        "metric_name": None,
        "metrics": {},
        "max_drop": None,
        "reference": (),
        "artifacts": (artifact,),
        "runtimes": (runtime,),
        "required": (),
        "selected": ("onnx",),
    }
    return Report.model_validate(fields | values)


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (_report(Status.PASS), ExitCode.OK),
        (_report(Status.FAIL), ExitCode.GATE),
        (_report(Status.PASS, Status.ERROR), ExitCode.GATE),
        # not_run is never a pass: an artifact that nothing ran is not checked
        (_report(Status.PASS, Status.NOT_RUN), ExitCode.UNSUPPORTED),
        (_report(Status.PASS, required=("device",)), ExitCode.UNSUPPORTED),
        (_report(Status.FAIL, required=("device",)), ExitCode.GATE),
    ],
)
def test_exit_codes(report: Report, code: ExitCode) -> None:
    assert report.exit_code is code
    assert report.to_json()["exit_code"] == code


def test_runtimes_that_did_not_run_alike_share_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def runtime(name: str, status: Status, message: str = "no Mac") -> RuntimeReport:
        finding = Finding(check="run", status=status, message=message)
        return RuntimeReport(runtime=name, target="onnx", where=f"on {name}", findings=(finding,))

    runtimes = (
        runtime("a", Status.NOT_RUN),
        runtime("b", Status.NOT_RUN),
        runtime("c", Status.NOT_RUN, "not installed"),
        runtime("d", Status.ERROR),
        runtime("e", Status.ERROR),
    )
    _print(_report(Status.PASS, runtimes=runtimes), Terminal())
    lines = capsys.readouterr().out.splitlines()
    found = [" ".join(line.split()) for line in lines if line.startswith(("not_run", "error"))]
    assert found == [
        "not_run a, b run no Mac",
        "not_run c run not installed",
        "error d run no Mac",
        "error e run no Mac",
    ]
    assert [line.split("  ")[-1] for line in lines if "onnx/a.onnx" in line] == [
        "a, b (on a)",
        "c (on c)",
        "d (on d)",
        "e (on e)",
    ]


def test_junit_has_a_suite_per_runtime_and_artifact() -> None:
    root = ElementTree.fromstring(junit_xml(_report(Status.FAIL, Status.NOT_RUN)))
    suites = {suite.get("name"): suite for suite in root}
    assert suites["onnx file"].get("failures") == "1"
    assert suites["onnx file"].find("testcase/failure").get("message") == "a <message> & more?"  # type: ignore[union-attr]
    assert suites["ort"].get("skipped") == "1"
    assert suites["required"].get("failures") == "1"


def test_a_comparison_that_notices_no_change_fails() -> None:
    output = REFERENCE[:1]
    seen, unseen = [output + 1], [output.copy()]

    def status(numeric_class: NumericClass, **controls: dict[str, list[Array]]) -> Status:
        named = {name.replace("_", " "): by_layer for name, by_layer in controls.items()}
        reference = SimpleNamespace(controls=named)
        limits = LIMITS[numeric_class]
        return _check_controls([REFERENCE], reference, limits, numeric_class).status  # type: ignore[arg-type]

    fp32, fp16 = NumericClass.FP32, NumericClass.FP16
    assert status(fp32, LUT_entry={"a": seen, "b": unseen}, index={}, bias={}) is Status.PASS
    assert status(fp32, LUT_entry={"a": seen, "b": unseen, "c": unseen}) is Status.FAIL
    # one of many indices or biases: some layer has to notice, unless float16 rounds it away
    for name in ("index", "bias"):
        for layers, passes in (({"a": seen, "b": unseen}, True), ({"a": unseen}, False)):
            found = status(fp32, LUT_entry={"a": seen}, **{name: layers})
            assert (found is Status.PASS) == passes
            assert status(fp16, LUT_entry={"a": seen}, **{name: layers}) is Status.PASS
