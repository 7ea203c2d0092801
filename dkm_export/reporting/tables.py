"""The content of a report in rows of plain text, for HTML and Markdown alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from dkm_export.checking.report import Report
from dkm_export.planning.result import Plan
from dkm_export.reporting.axes import signed
from dkm_export.reporting.content import Content
from dkm_export.reporting.weights import Distribution
from dkm_export.tables import FILE_STATUS, Table, number
from dkm_export.training.metrics import Metrics


def target_table(content: Content) -> Table:
    """Float weights, the checkpoint, and every artifact."""
    rows: list[tuple[object, ...]] = [
        ("float32 weights", "-", f"{content.fp32_bytes:,}", "1.0x", "-", "-"),
        ("checkpoint", "-", f"{content.checkpoint_bytes:,}", f"{content.ratio:.1f}x", "-", "-"),
    ]
    for target in content.targets:
        ratio = f"{content.fp32_bytes / target.bytes:.1f}x" if target.bytes else "-"
        limit = "-" if target.limit is None else f"{target.limit:,}"
        checked = target.checked or "not checked"
        rows.append((target.target, target.path, f"{target.bytes:,}", ratio, limit, checked))
    return Table.of(("what", "file", "bytes", "ratio to fp32", "at most", FILE_STATUS), rows)


def account_table(content: Content) -> Table:
    """Bytes of the checkpoint by kind, as they are stored and as the DKM paper counts."""
    account = content.account
    rows = [(line.kind, f"{line.stored:,}", f"{line.paper:,}") for line in account.lines]
    rows.append(("together", f"{account.stored:,}", f"{account.paper:,}"))
    ratio = f"{account.paper_ratio:.1f}x" if account.paper else "-"
    rows.append(("ratio to fp32", f"{content.ratio:.1f}x", ratio))
    return Table.of(("content", "bytes stored", "bytes as the paper counts"), rows)


def layer_table(content: Content) -> Table:
    """Every palette."""
    header = ("layer", "shape", "bits", "dim", "axis", "groups", "bits per weight")
    rows = [
        (
            ", tied: ".join((layer.name, *layer.tied)),
            shape(layer.shape),
            layer.bits,
            layer.dim,
            layer.axis,
            layer.groups,
            f"{8 * layer.bytes / layer.weights:.2f}",
            f"{layer.indices:,}",
            f"{layer.lut:,}",
            f"{layer.bytes:,}",
            f"{layer.used:,} of {layer.centroids:,}",
        )
        for layer in content.layers
    ]
    return Table.of((*header, "index bytes", "LUT bytes", "bytes", "centroids used"), rows)


def dense_table(content: Content) -> Table:
    """Everything without a palette, largest first."""
    dense = sorted(content.dense, key=lambda tensor: -tensor.bytes)
    rows = [(x.name, shape(x.shape), x.dtype, f"{x.bytes:,}") for x in dense]
    return Table.of(("tensor", "shape", "type", "bytes"), rows)


def epoch_table(metrics: Metrics) -> Table:
    """Every epoch of DKM training."""
    rows = [
        (
            epoch.epoch,
            f"{epoch.tau:.3g}",
            f"{epoch.loss:.4g}",
            f"{epoch.soft:.2f}",
            f"{epoch.hard:.2f}",
            signed(epoch.gap, "+.2f"),
        )
        for epoch in metrics.epochs
    ]
    return Table.of(("epoch", "temperature", "loss", "soft", "hard", "soft - hard"), rows)


def plan_table(plan: Plan) -> Table:
    """This plan, the uniform settings and the front."""
    rows = [("this plan", f"{planned_bytes(plan):,}", f"{plan.error:.4g}")]
    rows += [
        (point.name or "uniform", f"{point.bytes:,}", f"{point.error:.4g}")
        for point in plan.uniform
    ]
    rows += [("best of its size", f"{point.bytes:,}", f"{point.error:.4g}") for point in plan.front]
    return Table.of(("plan", "bytes", "predicted error"), rows)


def planned_table(plan: Plan, deviations: Sequence[str]) -> Table:
    """Every planned layer, and whether the checkpoint has it so."""
    rows = [
        (
            layer.name,
            layer.bits or "dense",
            layer.dim,
            layer.groups,
            f"{layer.bytes:,}",
            f"{layer.error:.3g}",
            "another setting" if layer.name in deviations else "as planned",
        )
        for layer in plan.layers
    ]
    header = ("layer", "bits", "dim", "groups", "bytes", "predicted error", "in the checkpoint")
    return Table.of(header, rows)


def planned_bytes(plan: Plan) -> int:
    """Of the palettes, and of the weights that could have had one: what the front counts."""
    return sum(layer.bytes for layer in plan.layers)


def centroid_table(weights: Distribution) -> Table:
    """Every centroid that a figure shows."""
    unit = "weights" if weights.dim == 1 else "vectors"
    rows = [
        (", ".join(signed(value, ".5g") for value in centroid.values), f"{centroid.count:,}")
        for centroid in weights.centroids
    ]
    return Table.of(("centroid", unit), rows)


def bin_table(weights: Distribution) -> Table:
    """Every bin of the histogram."""
    rows = [
        (signed(low, ".5g"), signed(high, ".5g"), f"{count:,}")
        for (low, high), count in zip(pairwise(weights.edges), weights.bins, strict=True)
    ]
    return Table.of(("from", "to", "weights"), rows)


def version_table(content: Content) -> Table:
    """Packages by what they did."""
    rows = [
        (what, package, version)
        for what, packages in content.versions
        for package, version in packages.items()
    ]
    return Table.of(("what", "package", "version"), rows)


def note_table(check: Report) -> Table:
    """What a check noted of the artifacts."""
    rows = [(artifact.target, note) for artifact in check.artifacts for note in artifact.notes]
    return Table.of(("artifact", "note"), rows)


def setting_table(content: Content) -> Table:
    """What the checkpoint says of its model."""
    source, spec = content.model.source, content.model.spec
    rows: list[tuple[str, str]] = [("factory", source.factory)]
    rows += [("task", source.task.factory)] if source.task else []
    rows += [(f"input {spec.name}", f"{spec.dtype} {shape(spec.shape)}") for spec in source.inputs]
    rows.append(("batch norm", source.batch_norm.replace("-", " ")))
    if content.metrics:
        rows.append(("seed", str(content.metrics.seed)))
    small = f"fewer than {spec.small_layer_size:,} weights: {spec.small_layer_bits} bits"
    rows += [("small layers", small)] if spec.small_layer_size else []
    for rule in spec.rules:
        kinds = f", {', '.join(rule.kinds)} only" if rule.kinds else ""
        given = rule.model_dump(exclude_defaults=True, exclude={"pattern", "kinds"})
        rows.append((f"rule {rule.pattern}{kinds}", _rule(given)))
    return Table.of(("setting", "value"), rows)


def file_table(content: Content) -> Table:
    """Every file with its hash."""
    rows = [(x.path, f"{x.bytes:,}", x.sha256, x.state) for x in content.files]
    return Table.of(("file", "bytes", "sha256", "how it is known"), rows)


def change(content: Content) -> str:
    """By how much the metric changed, or an empty string."""
    if content.fp32 is None or content.hard is None:
        return ""
    return signed(content.hard - content.fp32, "+.2f")


def shape(sizes: Sequence[int]) -> str:
    """``64x3x3``, or ``scalar``."""
    return "x".join(map(str, sizes)) or "scalar"


def metric(value: float | None) -> str:
    """A metric in the digits that all reports have."""
    return number(value, ".2f")


def _rule(given: dict[str, object]) -> str:
    words = [key if value is True else f"{key} {value}" for key, value in given.items()]
    return ", ".join(words)
