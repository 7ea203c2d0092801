"""A check as Markdown, for the page of a build: what did not pass first, then every figure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from dkm_export.checking.metrics import Fidelity
from dkm_export.checking.report import Finding, Report, RuntimeReport, Status, merged, worst
from dkm_export.errors import ExitCode

_ORDER = (Status.ERROR, Status.FAIL, Status.NOT_RUN, Status.PASS)
_ARTIFACTS = ("artifact", "status", "bytes", "at most", "ratio to fp32")
_RUNTIMES = ("runtime", "status", "how it runs", "artifact", "relative L2", "metric")
_FIGURES = ("runtime", "output", "relative L2", "SQNR, dB", "elements outside")


def summary(report: Report) -> str:
    """The report as GitHub's Markdown, with a line at its end."""
    parts = [
        f"## {_text(report.name)}: {_verdict(report)}",
        "\n".join(_problems(report)),
        _metrics(report),
        _table(_RUNTIMES, _runtimes(report)),
        _table(_ARTIFACTS, _artifacts(report)),
        "<details><summary>every figure, thresholds, hashes and versions</summary>",
        _table(_FIGURES, _figures(report)),
        _table(("threshold", "value", "from"), _thresholds(report)),
        _table(("file", "bytes", "sha256"), _hashes(report)),
        f"Made with {_versions(report.versions)}. "
        f"Checked with {_versions(report.checked_with)} on {_text(report.machine)}.",
        "</details>",
    ]
    return "\n\n".join(part for part in parts if part) + "\n\n"


def _verdict(report: Report) -> str:
    match report.exit_code:
        case ExitCode.OK:
            return "passed"
        case ExitCode.GATE:
            return "failed (exit code 3)"
        case code:
            return f"not everything was checked (exit code {int(code)})"


def _problems(report: Report) -> Iterator[str]:
    """Findings that are no pass, worst first."""
    runtimes = tuple(merged(report.runtimes))
    suites = report.model_copy(update={"runtimes": runtimes}).suites
    found = [(owner, finding) for owner, findings in suites for finding in findings]
    for owner, finding in sorted(found, key=lambda pair: _ORDER.index(pair[1].status)):
        if finding.status is not Status.PASS:
            text = _text(f"{owner}, {finding.check}: {finding.message}")
            yield f"- {_status([finding])} {text}"
    yield from (f"- **not done** {_text(line)}" for line in report.missing)


def _metrics(report: Report) -> str:
    if not report.metrics:
        return ""
    before, after = (_figure(report.metrics.get(name), ".2f") for name in ("fp32", "hard"))
    text = f"{report.metric_name or 'metric'}: {before} before compression, {after} after"
    drop = f", may fall by {report.max_drop.value:g}" if report.max_drop else ""
    return _text(text + drop)


def _artifacts(report: Report) -> Iterator[Sequence[str]]:
    for artifact in report.artifacts:
        ratio = f"{report.fp32_bytes / artifact.bytes:.1f}x" if artifact.bytes else "-"
        limit = f"{artifact.max_bytes.value:,.0f}" if artifact.max_bytes else "-"
        status = _status(artifact.findings)
        yield _text(artifact.path), status, f"{artifact.bytes:,}", limit, ratio


def _runtimes(report: Report) -> Iterator[Sequence[str]]:
    """Failures first, with the largest relative error of each runtime."""
    paths = {artifact.target: artifact.path for artifact in report.artifacts}
    for runtime in sorted(merged(report.runtimes), key=lambda entry: _ORDER.index(entry.status)):
        errors = [fidelity.relative_l2 for _, fidelity in _measured(runtime)]
        limit = f" (≤ {runtime.limits.relative_l2:g})" if runtime.limits else ""
        yield (
            _text(runtime.runtime),
            _status(runtime.findings),
            _text(", ".join(filter(None, (runtime.where, runtime.version)))),
            _text(paths[runtime.target]),
            _figure(max(errors, default=None), ".1e") + limit,
            _figure(runtime.metric, ".2f"),
        )


def _figures(report: Report) -> Iterator[Sequence[str]]:
    for runtime in report.runtimes:
        for name, fidelity in _measured(runtime):
            assert runtime.limits is not None  # what was measured has limits
            sqnr = "exact" if fidelity.sqnr_db is None else f"{fidelity.sqnr_db:.1f}"
            yield (
                _text(runtime.runtime),
                _text(name),
                f"{fidelity.relative_l2:.1e} (≤ {runtime.limits.relative_l2:g})",
                f"{sqnr} (≥ {runtime.limits.sqnr_db:g})",
                f"{fidelity.outside} (≤ 0)",
            )


def _measured(runtime: RuntimeReport) -> Iterator[tuple[str, Fidelity]]:
    for name, fidelity in runtime.fidelity.items():
        yield f"{name}, samples", fidelity
    if runtime.predictions:
        yield f"{next(iter(runtime.fidelity))}, test split", runtime.predictions


def _thresholds(report: Report) -> Iterator[Sequence[str]]:
    classes = {r.numeric_class: r.limits for r in report.runtimes if r.limits}
    for numeric_class, limits in classes.items():
        for name, source in limits.sources.items():
            yield f"{numeric_class} {_text(name)}", f"{getattr(limits, name):g}", _text(source)
    for artifact in report.artifacts:
        if limit := artifact.max_bytes:
            yield f"{_text(artifact.target)} bytes", f"{limit.value:,.0f}", _text(limit.source)
    if report.max_drop:
        yield "drop of the metric", f"{report.max_drop.value:g}", _text(report.max_drop.source)


def _hashes(report: Report) -> Iterator[Sequence[str]]:
    for artifact in report.artifacts:
        for file in artifact.files:
            yield _text(file.path), f"{file.bytes:,}", file.sha256
    yield "checkpoint", "", report.checkpoint_sha256


def _status(findings: Sequence[Finding]) -> str:
    status = worst(findings)
    return "pass" if status is Status.PASS else f"**{status.replace('_', ' ')}**"


def _versions(versions: dict[str, str]) -> str:
    return _text(", ".join(f"{name} {version}" for name, version in versions.items()))


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) if len(lines) > 2 else ""


def _text(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
