"""A check as lines that a build shows beside its files: workflow commands of GitHub, or Xcode's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dkm_export.checking.report import Report, Status, merged
from dkm_export.errors import ExitCode


@dataclass(frozen=True)
class Diagnostic:
    """One line.

    Attributes:
        level: an ``error`` for what gives the check its exit code, else a ``note``.
        path: the file or folder that it is about.
        title: which check of what.
    """

    level: Literal["error", "note"]
    path: Path
    title: str
    message: str


def diagnostics(report: Report, root: Path) -> list[Diagnostic]:
    """What did not pass, errors first; at least one error unless the exit code is 0.

    Args:
        report: the check.
        root: the export's folder.
    """
    return sorted(_diagnostics(report, root), key=lambda line: line.level != "error")


def _diagnostics(report: Report, root: Path) -> Iterator[Diagnostic]:
    places = {artifact.target: root / artifact.path for artifact in report.artifacts}
    runtimes = [runtime for runtime in report.runtimes if runtime.runtime not in report.idle]
    suites = [("pytorch", root, report.reference)]
    suites += [(f"{a.target} file", places[a.target], a.findings) for a in report.artifacts]
    suites += [(r.runtime, places[r.target], r.findings) for r in merged(runtimes)]
    for owner, path, findings in suites:
        for finding in findings:
            if finding.status is not Status.PASS:
                level: Literal["error", "note"] = (
                    "note" if finding.status is Status.NOT_RUN else "error"
                )
                message = f"{finding.status}: {finding.message}"
                yield Diagnostic(level, path, f"{owner}: {finding.check}", message)
    for name in report.idle:
        reasons = [f.message for r in report.runtimes if r.runtime == name for f in r.findings]
        message = ": ".join(["required, and did not run", *reasons])
        yield Diagnostic("error", root, f"{name}: run", message)
    for line in report.unchecked:
        yield Diagnostic("error", root, "not done", line)
    for artifact in report.artifacts:
        for note in artifact.notes:
            yield Diagnostic("note", places[artifact.target], f"{artifact.target} file", note)
    if report.exit_code is ExitCode.OK:
        ran = [r for r in report.runtimes if r.status is Status.PASS]
        names = ", ".join(f"{runtime.runtime} ({runtime.where})" for runtime in ran)
        yield Diagnostic("note", root, report.name, f"passed on {names}")


def _github(line: Diagnostic) -> str:
    """A workflow command; the runner makes the path one of the repository."""
    command = {"error": "error", "note": "notice"}[line.level]
    file, title = (_escaped(str(text), ":,") for text in (line.path, f"dkm: {line.title}"))
    return f"::{command} file={file},title={title}::{_escaped(line.message)}"


def _escaped(text: str, others: str = "") -> str:
    for character in f"%\r\n{others}":  # % first: the others become it
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def _xcode(line: Diagnostic) -> str:
    return " ".join(f"{line.path}: {line.level}: {line.title}: {line.message}".split())


FORMATS: dict[str, Callable[[Diagnostic], str]] = {"github": _github, "xcode": _xcode}
"""By name on the command line: one diagnostic as a line."""
