"""A check as JUnit XML, which build servers read: a suite per runtime and artifact."""

from __future__ import annotations

from collections import Counter
from xml.etree import ElementTree

from dkm_export.checking.report import Report, Status
from dkm_export.text import printable

_ELEMENT = {Status.FAIL: "failure", Status.ERROR: "error", Status.NOT_RUN: "skipped"}


def junit_xml(report: Report) -> bytes:
    """The report as UTF-8 XML; ``not_run`` becomes ``<skipped>``."""
    root = ElementTree.Element("testsuites", name=f"dkm check {report.name}")
    for owner, cases in report.suites:
        statuses = Counter(case.status for case in cases)
        suite = _suite(root, owner, len(cases), statuses)
        for number, case in enumerate(cases, 1):
            element = ElementTree.SubElement(
                suite, "testcase", classname=owner, name=f"{number} {case.check}"
            )
            if case.status is Status.PASS:
                ElementTree.SubElement(element, "system-out").text = printable(case.message)
            else:
                message = printable(case.message)
                ElementTree.SubElement(element, _ELEMENT[case.status], message=message)
    if report.missing:
        count = len(report.missing)
        suite = _suite(root, "required", count, Counter({Status.FAIL: count}))
        for line in report.missing:
            element = ElementTree.SubElement(suite, "testcase", classname="required", name=line)
            ElementTree.SubElement(element, "failure", message=line)
    ElementTree.indent(root)
    xml: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return xml + b"\n"


def _suite(
    root: ElementTree.Element, name: str, tests: int, statuses: Counter[Status]
) -> ElementTree.Element:
    return ElementTree.SubElement(
        root,
        "testsuite",
        name=name,
        tests=str(tests),
        failures=str(statuses[Status.FAIL]),
        errors=str(statuses[Status.ERROR]),
        skipped=str(statuses[Status.NOT_RUN]),
    )
