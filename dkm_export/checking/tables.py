"""The figures of a check in rows of plain text, for reports of any format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dkm_export.checking.metrics import Fidelity
from dkm_export.checking.report import Finding, Report, RuntimeReport, Status, merged, worst
from dkm_export.errors import ExitCode
from dkm_export.tables import FILE_STATUS, STATUS, Table, number

_ORDER = (Status.ERROR, Status.FAIL, Status.NOT_RUN, Status.PASS)


def verdict(report: Report) -> str:
    """How the check ended."""
    match report.exit_code:
        case ExitCode.OK:
            return "passed"
        case ExitCode.GATE:
            return "failed (exit code 3)"
        case code:
            return f"not everything was checked (exit code {int(code)})"


def problems(report: Report) -> Iterator[tuple[str, str]]:
    """Status and text of what is no pass, worst first."""
    runtimes = tuple(merged(report.runtimes))
    suites = report.model_copy(update={"runtimes": runtimes}).suites
    found = [(owner, finding) for owner, findings in suites for finding in findings]
    for owner, finding in sorted(found, key=lambda pair: _ORDER.index(pair[1].status)):
        if finding.status is not Status.PASS:
            yield status_of([finding]), f"{owner}, {finding.check}: {finding.message}"
    yield from (("not done", line) for line in report.missing)


def artifact_table(report: Report) -> Table:
    """Every artifact with its size."""
    rows = []
    for artifact in report.artifacts:
        ratio = f"{report.fp32_bytes / artifact.bytes:.1f}x" if artifact.bytes else "-"
        limit = f"{artifact.max_bytes.value:,.0f}" if artifact.max_bytes else "-"
        status = status_of(artifact.findings)
        rows.append((artifact.path, status, f"{artifact.bytes:,}", limit, ratio))
    return Table.of(("artifact", FILE_STATUS, "bytes", "at most", "ratio to fp32"), rows)


def runtime_table(report: Report) -> Table:
    """Every runtime, failures first, with the largest relative error of each."""
    paths = {artifact.target: artifact.path for artifact in report.artifacts}
    rows = []
    for runtime in sorted(merged(report.runtimes), key=lambda entry: _ORDER.index(entry.status)):
        limit = f" (≤ {runtime.limits.relative_l2:g})" if runtime.limits else ""
        rows.append(
            (
                runtime.runtime,
                status_of(runtime.findings),
                ", ".join(filter(None, (runtime.where, runtime.version))),
                runtime.numeric_class or "-",
                paths[runtime.target],
                number(worst_error(runtime), ".1e") + limit,
                number(runtime.metric, ".2f"),
            )
        )
    header = ("runtime", STATUS, "how it runs", "class", "artifact", "relative L2", "metric")
    return Table.of(header, rows)


def figure_table(report: Report) -> Table:
    """Every measured output beside its limits."""
    rows = []
    for runtime in report.runtimes:
        for name, fidelity in measured(runtime):
            assert runtime.limits is not None  # what was measured has limits
            sqnr = "exact" if fidelity.sqnr_db is None else number(fidelity.sqnr_db, ".1f")
            rows.append(
                (
                    runtime.runtime,
                    name,
                    f"{number(fidelity.relative_l2, '.1e')} (≤ {runtime.limits.relative_l2:g})",
                    f"{sqnr} (≥ {runtime.limits.sqnr_db:g})",
                    f"{fidelity.outside} (≤ 0)",
                )
            )
    return Table.of(("runtime", "output", "relative L2", "SQNR, dB", "elements outside"), rows)


def threshold_table(report: Report) -> Table:
    """Every threshold, and what set it."""
    rows = []
    classes = {r.numeric_class: r.limits for r in report.runtimes if r.limits}
    for numeric_class, limits in classes.items():
        for name, source in limits.sources.items():
            rows.append((f"{numeric_class} {name}", f"{getattr(limits, name):g}", source))
    for artifact in report.artifacts:
        if limit := artifact.max_bytes:
            rows.append((f"{artifact.target} bytes", f"{limit.value:,.0f}", limit.source))
    if report.max_drop:
        rows.append(("drop of the metric", f"{report.max_drop.value:g}", report.max_drop.source))
    return Table.of(("threshold", "value", "from"), rows)


def hash_table(report: Report) -> Table:
    """The files of the artifacts, and the checkpoint."""
    files = [file for artifact in report.artifacts for file in artifact.files]
    rows = [(file.path, f"{file.bytes:,}", file.sha256) for file in files]
    rows.append(("checkpoint", "", report.checkpoint_sha256))
    return Table.of(("file", "bytes", "sha256"), rows)


def measured(runtime: RuntimeReport) -> Iterator[tuple[str, Fidelity]]:
    """What was compared on a runtime, by a name in words."""
    for name, fidelity in runtime.fidelity.items():
        yield f"{name}, samples", fidelity
    if runtime.predictions:
        first = next(iter(runtime.fidelity), "first output")
        yield f"{first}, test split", runtime.predictions


def worst_error(runtime: RuntimeReport) -> float | None:
    """The largest relative L2 that was measured."""
    return max((fidelity.relative_l2 for _, fidelity in measured(runtime)), default=None)


def status_of(findings: Sequence[Finding]) -> str:
    """The worst status, in words."""
    return worst(findings).replace("_", " ")


def versions(packages: dict[str, str]) -> str:
    """Packages with their versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in packages.items())
