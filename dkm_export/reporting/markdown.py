"""A report as GitHub's Markdown, for the page of a build or a review."""

from __future__ import annotations

from collections.abc import Sequence

from dkm_export.checking.report import Report
from dkm_export.checking.summary import problem_list
from dkm_export.checking.tables import figure_table, runtime_table, threshold_table, verdict
from dkm_export.planning.result import Plan
from dkm_export.reporting import tables
from dkm_export.reporting.axes import signed
from dkm_export.reporting.content import Content
from dkm_export.reporting.weights import Distribution
from dkm_export.reporting.wording import (
    COUNTED,
    accuracy_lines,
    fidelity_lines,
    follows_line,
    front_lines,
    lede,
    weights_line,
)
from dkm_export.tables import Table
from dkm_export.tables import markdown as text
from dkm_export.training.metrics import Metrics

_BLOCKS = " ▁▂▃▄▅▆▇█"


def markdown(content: Content) -> str:
    """The report, with a line at its end; the same content gives the same text."""
    checked = f"Checks: {verdict(content.check)}." if content.check else "Not checked."
    parts = [
        f"# {text(content.name)}: palettization report",
        f"{text(lede(content))} **{checked}**",
        "\n".join(f"- {text(x.what)}: {x.how}" for x in content.missing),
        "## Size by target",
        tables.target_table(content).markdown(),
        _fold("by kind, and as the DKM paper counts", tables.account_table(content)),
        "## Size by layer",
        tables.layer_table(content).markdown(),
        _fold("tensors without a palette", tables.dense_table(content)),
        *(_accuracy(content.metrics) if content.metrics else ()),
        *(_front(content.plan, content.deviations) if content.plan else ()),
        *(_fidelity(content.check) if content.check else ()),
        *_weights(content.shown),
        "## Environment and hashes",
        tables.file_table(content).markdown(),
        _fold("versions", tables.version_table(content)),
        _fold("model and settings", tables.setting_table(content)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _accuracy(metrics: Metrics) -> Sequence[str]:
    lines = text(" ".join(accuracy_lines(metrics)))
    return "## Accuracy by epoch", lines, tables.epoch_table(metrics).markdown()


def _front(plan: Plan, deviations: Sequence[str]) -> Sequence[str]:
    return (
        "## Pareto front",
        text(" ".join((*front_lines(plan), follows_line(plan, deviations)))),
        tables.plan_table(plan).markdown(),
        _fold("every planned layer", tables.planned_table(plan, deviations)),
    )


def _fidelity(check: Report) -> Sequence[str]:
    return (
        "## Fidelity by runtime",
        text(" ".join(fidelity_lines(check))),
        problem_list(check),
        runtime_table(check).markdown(),
        _fold("every figure", figure_table(check)),
        _fold("thresholds, and what set them", threshold_table(check)),
        _fold("notes on the artifacts, for who ships them", tables.note_table(check)),
    )


def _weights(shown: Sequence[Distribution]) -> Sequence[str]:
    if not shown:
        return ()
    lines = [f"- {text(x.name)} `{_sparks(x)}` {text(weights_line(x))}" for x in shown]
    return "## Weights and centroids", text(COUNTED), "\n".join(lines)


def _sparks(weights: Distribution) -> str:
    """The histogram of all weights in a line, from the least to the largest."""
    most = max(weights.bins)
    low, high = (signed(weights.edges[end], ".3g") for end in (0, -1))
    # only a bin without any weight is a gap
    blocks = "".join(_BLOCKS[-(-(len(_BLOCKS) - 1) * n // most)] for n in weights.bins)
    return f"{low} {blocks} {high}"


def _fold(label: str, table: Table) -> str:
    if not table.rows:
        return ""
    return f"<details><summary>{label}</summary>\n\n{table.markdown()}\n\n</details>"
