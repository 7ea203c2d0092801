"""The sections of an HTML report that have figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dkm_export.checking.report import Report, RuntimeReport, Status
from dkm_export.checking.tables import (
    figure_table,
    problems,
    status_of,
    threshold_table,
    worst_error,
)
from dkm_export.planning.result import Plan
from dkm_export.reporting import charts, tables
from dkm_export.reporting.axes import size
from dkm_export.reporting.content import Content
from dkm_export.reporting.elements import Bar, bars, fold, legend, notes, prose, section, status
from dkm_export.reporting.markup import Child, Markup, tag
from dkm_export.reporting.weights import Distribution
from dkm_export.reporting.wording import (
    COUNTED,
    accuracy_lines,
    bits,
    compared,
    fidelity_lines,
    follows_line,
    front_lines,
    weights_line,
)
from dkm_export.tables import number
from dkm_export.training.metrics import Metrics

_MOST_BARS = 20
_MOST_STEMS = 64
_LEAST_ERROR, _MOST_ERROR = 1e-16, 1e16
"""The scale of errors goes no further: float64 resolves nothing smaller."""


def target_section(content: Content) -> Markup:
    """Bytes of the float weights, the checkpoint and the artifacts."""
    rows = [
        Bar(
            "float32 weights", "before", (("dense", content.fp32_bytes),), size(content.fp32_bytes)
        ),
        _size_bar(content, "checkpoint", "model.dkm.safetensors", content.checkpoint_bytes),
    ]
    for target in content.targets:
        limit = "" if target.limit is None else f", at most {size(target.limit)}"
        rows.append(_size_bar(content, target.target, f"{target.path}{limit}", target.bytes))
    about = ["All files of an artifact together, with the graph and what is stored beside weights."]
    return section(
        "Size by target",
        about,
        (
            bars(rows, "Bytes by target"),
            fold("Every byte count", tables.target_table(content)),
            fold("By kind, and as the DKM paper counts", tables.account_table(content)),
        ),
    )


def _size_bar(content: Content, name: str, note: str, count: int) -> Bar:
    ratio = compared(content.fp32_bytes / count, "x") if count and content.fp32_bytes else ""
    return Bar(name, note, (("indices", count),), size(count), ratio)


def layer_section(content: Content) -> Markup:
    """Bytes of every palette and of everything else."""
    largest = sorted(content.layers, key=lambda layer: -layer.bytes)[:_MOST_BARS]
    rows = [
        Bar(
            layer.name,
            f"{bits(layer.bits)}, dim {layer.dim}"
            + (f", {layer.groups} groups" if layer.groups > 1 else ""),
            (("indices", layer.indices), ("lut", layer.lut)),
            size(layer.bytes),
            f"{8 * layer.bytes / layer.weights:.2f} bits per weight",
        )
        for layer in content.layers
        if layer in largest
    ]
    rest = [layer for layer in content.layers if layer not in largest]
    if rest:
        indices, luts = sum(x.indices for x in rest), sum(x.lut for x in rest)
        parts = (("indices", indices), ("lut", luts))
        rows.append(Bar(f"{len(rest)} smaller palettes", "together", parts, size(indices + luts)))
    dense = sum(tensor.bytes for tensor in content.dense)
    rows.append(
        Bar(
            f"{len(content.dense)} tensors without a palette",
            "together, as they are stored",
            (("dense", dense),),
            size(dense),
        )
    )
    about = [
        "Packed indices and float16 LUTs of each palette in the checkpoint, in the order of the "
        "model.",
        "Bits per weight count both, so small layers pay for their LUT.",
    ]
    kinds = (("indices", "indices"), ("lut", "LUT"), ("dense", "without a palette"))
    return section(
        "Size by layer",
        about,
        (
            legend(kinds, swatches=True),
            bars(rows, "Bytes by layer"),
            fold(f"All {len(content.layers)} palettes", tables.layer_table(content)),
            fold("Tensors without a palette", tables.dense_table(content)),
        ),
    )


def accuracy_section(metrics: Metrics, name: str) -> Markup:
    """The metric by epoch, with soft and with hard weights."""
    title = "Accuracy by epoch"
    if not metrics.epochs:
        return section(title, [], map(_plain, accuracy_lines(metrics)))
    soft, hard = ([getattr(x, style) for x in metrics.epochs] for style in ("soft", "hard"))
    series = [
        charts.Series("soft", "soft", tuple(soft)),
        charts.Series("hard", "hard", tuple(hard)),
    ]
    description = (
        f"{name} over {len(soft)} epochs: soft from {soft[0]:.2f} to {soft[-1]:.2f}, hard from "
        f"{hard[0]:.2f} to {hard[-1]:.2f}; before palettizing {tables.metric(metrics.fp32)}"
    )
    entries = [("soft", "soft weights, as trained"), ("hard", "hard weights, as exported")]
    if metrics.fp32 is not None:
        entries.append(("reference", f"float32, {metrics.fp32:.2f}"))
    figure = charts.both(
        lambda width: charts.epochs(width, series, metrics.fp32, name, description)
    )
    parts = (legend(entries), figure, fold("Every epoch", tables.epoch_table(metrics)))
    return section(title, accuracy_lines(metrics), parts)


def front_section(plan: Plan, deviations: Sequence[str]) -> Markup:
    """Plans by size and predicted error."""
    best = [charts.Spot(point.bytes, point.error) for point in plan.front]
    named = [charts.Spot(point.bytes, point.error, point.name) for point in plan.uniform]
    chosen = charts.Spot(tables.planned_bytes(plan), plan.error, "this plan")
    description = (
        f"{len(best)} best plans by size, {len(named)} uniform settings, and this plan of "
        f"{chosen.x:,.0f} bytes with a predicted error of {chosen.y:.3g}"
    )
    entries = [
        ("front", "best plans by size"),
        ("uniform", "one setting for all, bits/dim"),
        ("chosen", "this plan"),
    ]
    figure = charts.both(lambda width: charts.front(width, best, named, chosen, description))
    parts = (
        legend(entries),
        figure,
        _plain(follows_line(plan, deviations)),
        fold("Every plan", tables.plan_table(plan)),
        fold("Every planned layer", tables.planned_table(plan, deviations)),
    )
    return section("Pareto front", front_lines(plan), parts)


def fidelity_section(check: Report) -> Markup:
    """Errors beside their limits, and what did not run."""
    runs = [x for x in check.runtimes if x.status is not Status.NOT_RUN]
    found = list(problems(check))
    idle = [line for line in found if line[0] == "not run"]
    other = [line for line in found if line[0] != "not run"]
    entries: list[Child] = []
    if other:
        entries += [tag("h3", "What did not pass"), notes(other)]
    if runs:
        entries += [_KEY, _runtimes(runs, check.metric_name)]
    else:
        entries.append(_plain("No runtime ran."))
    if idle:
        entries += [tag("h3", "Not run"), notes(idle)]
    entries += [
        fold("Every figure", figure_table(check)),
        fold("Thresholds, and what set them", threshold_table(check)),
        fold("Notes on the artifacts, for who ships them", tables.note_table(check)),
    ]
    return section("Fidelity by runtime", fidelity_lines(check), entries)


_KEY = tag(
    "ul",
    [
        tag("li", tag("span", tag("i", class_=style), class_="dot"), text)
        for style, text in (
            ("found", "error, on a logarithmic scale"),
            ("found over", "error over its limit"),
            ("most", "limit"),
        )
    ],
    class_="legend",
)


def _runtimes(runs: Sequence[RuntimeReport], metric: str | None) -> Markup:
    errors = [worst_error(runtime) for runtime in runs]
    limits = [runtime.limits.relative_l2 for runtime in runs if runtime.limits]
    finite = [x for x in (*errors, *limits) if x and math.isfinite(x)]
    seen = [min(max(x, _LEAST_ERROR), _MOST_ERROR) for x in finite]
    low, high = min(seen, default=1e-9) / 5, max(seen, default=1.0) * 5

    def place(value: float) -> str:
        # what is beyond the scale, as 0 is, is at an end
        inside = min(max(value, low), high)
        return f"left:{100 * math.log(inside / low) / math.log(high / low):.2f}%"

    rows = []
    for runtime, error in zip(runs, errors, strict=True):
        marks, figure = [], "-"
        if error is not None and runtime.limits:
            limit = runtime.limits.relative_l2
            over = "" if error <= limit else " over"
            marks = [
                tag("i", class_="most", style=place(limit)),
                tag("i", class_=f"found{over}", style=place(error)),
            ]
            shown = number(error, ".1e") if error else "0"
            figure = f"{shown} {'>' if over else '≤'} {limit:g}"
        where = ", ".join(filter(None, (runtime.where, runtime.version, runtime.numeric_class)))
        measured = "" if runtime.metric is None else f"{metric or 'metric'} {runtime.metric:.2f}"
        rows.append(
            tag(
                "tr",
                tag("th", runtime.runtime, tag("small", where), class_="name", scope="row"),
                tag("td", tag("div", marks, class_="dot", aria_hidden="true"), class_="figure"),
                tag("td", status(status_of(runtime.findings)), class_="status"),
                tag("td", tag("span", figure), tag("small", measured), class_="value"),
            )
        )
    heads = (
        ("name", "runtime"),
        ("figure", ""),
        ("status", "status"),
        ("value", "relative L2"),
    )
    head = tag("tr", [tag("th", text, class_=style, scope="col") for style, text in heads])
    return tag("table", tag("thead", head), tag("tbody", rows), class_="bars")


def weight_section(shown: Sequence[Distribution]) -> Markup | None:
    """Centroids and how many weights each stands for."""
    if not shown:
        return None
    about = [COUNTED, prose("`--layer PATTERN` chooses other layers.")]
    plots = []
    for weights in shown:
        plot = tag(
            "div",
            tag("h3", weights.name),
            tag("p", "; ".join(filter(None, (weights_line(weights), _shown(weights))))),
            _weights(weights),
            fold("Every bin", tables.bin_table(weights)) if _binned(weights) else None,
            fold("Centroids", tables.centroid_table(weights)),
        )
        plots.append(plot)
    return section("Weights and centroids", about, [tag("div", plots, class_="plots")])


def _shown(weights: Distribution) -> str:
    """What a figure shows of vectors, which have more weights than a plane has directions."""
    parts = []
    if weights.dim > 1:
        parts.append(f"a point is the first 2 of the {weights.dim} weights")
    if weights.total > len(weights.centroids):
        parts.append(f"marked are the {len(weights.centroids)} most used centroids")
    return "; ".join(parts)


def _weights(weights: Distribution) -> Markup:
    description = f"Weights of {weights.name} by centroid: {weights_line(weights)}"
    if weights.dim > 1:
        spots = [(x.values[0], x.values[1], x.count) for x in weights.centroids]
        return charts.cloud(spots, description)
    values = [(x.values[0], x.count) for x in weights.centroids]
    if _binned(weights):
        centroids = [value for value, _ in values]
        return charts.bins(weights.edges, weights.bins, centroids, description)
    return charts.stems(values, description)


def _binned(weights: Distribution) -> bool:
    return weights.dim == 1 and weights.total > _MOST_STEMS


def _plain(text: str) -> Markup:
    return tag("p", text, class_="plain")
