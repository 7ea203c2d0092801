"""A check as Markdown, for the page of a build: what did not pass first, then every figure."""

from __future__ import annotations

from dkm_export.checking import tables
from dkm_export.checking.report import Report
from dkm_export.tables import markdown, number


def summary(report: Report) -> str:
    """The report as GitHub's Markdown, with a line at its end."""
    made, checked = tables.versions(report.versions), tables.versions(report.checked_with)
    parts = [
        f"## {markdown(report.name)}: {tables.verdict(report)}",
        problem_list(report),
        _metrics(report),
        tables.runtime_table(report).markdown(),
        tables.artifact_table(report).markdown(),
        "<details><summary>every figure, thresholds, hashes and versions</summary>",
        tables.figure_table(report).markdown(),
        tables.threshold_table(report).markdown(),
        tables.hash_table(report).markdown(),
        markdown(f"Made with {made}. Checked with {checked} on {report.machine}."),
        "</details>",
    ]
    return "\n\n".join(part for part in parts if part) + "\n\n"


def problem_list(report: Report) -> str:
    """What did not pass, as a list."""
    lines = (f"- **{status}** {markdown(text)}" for status, text in tables.problems(report))
    return "\n".join(lines)


def _metrics(report: Report) -> str:
    if not report.metrics:
        return ""
    before, after = (number(report.metrics.get(name), ".2f") for name in ("fp32", "hard"))
    text = f"{report.metric_name or 'metric'}: {before} before compression, {after} after"
    drop = f", may fall by {report.max_drop.value:g}" if report.max_drop else ""
    return markdown(text + drop)
