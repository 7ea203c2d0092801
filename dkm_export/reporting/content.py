"""What a report says, as data: gathered from its inputs, and written by no format yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dkm_export import __version__
from dkm_export.checking.report import Report, Status
from dkm_export.checking.tables import status_of
from dkm_export.errors import InvalidInput
from dkm_export.palette import Palette
from dkm_export.palettized import PalettizedModel
from dkm_export.planning.result import Plan
from dkm_export.reporting.sources import Sources
from dkm_export.reporting.weights import Distribution, distribution, used_centroids
from dkm_export.sizing import Account, account
from dkm_export.training.metrics import Metrics

_CHOSEN = 4
"""Layers whose weights are shown when none is named."""

AS_EXPORTED, CHANGED, GONE = "as exported", "changed since the export", "missing"
READ, AS_CHECKED = "read for this report", "as checked, not read"


@dataclass(frozen=True)
class Layer:
    """One palette; all sizes in bytes.

    Attributes:
        shape: of the weight.
        weights: how many it has.
        used: centroids that at least one index names, of ``centroids``.
        tied: other parameters that are this one.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    dim: int
    axis: int
    groups: int
    weights: int
    indices: int
    lut: int
    used: int
    centroids: int
    tied: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """What the checkpoint stores of it."""
        return self.indices + self.lut


@dataclass(frozen=True)
class Dense:
    """One tensor without a palette."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Target:
    """One artifact.

    Attributes:
        bytes: of all its files.
        limit: the most that a check let it have, or None.
        checked: outcome of the check of its file in words, or None when no check read it.
    """

    target: str
    path: str
    bytes: int
    limit: int | None
    checked: str | None


@dataclass(frozen=True)
class File:
    """One file and its hash; ``state`` says how it is known."""

    path: str
    bytes: int
    sha256: str
    state: str


@dataclass(frozen=True)
class Missing:
    """What a report does not show, and in fixed words how to have it shown, code in backticks."""

    what: str
    how: str


@dataclass(frozen=True)
class Content:
    """Everything in a report, in the order of the checkpoint.

    Attributes:
        name: of the model.
        model: the palettized model.
        checkpoint_bytes: of its file.
        account: its bytes by kind.
        metric_name: what the task measures.
        fp32: the metric before compression, or None.
        hard: the metric of the palettized model, as the checkpoint has it, or None.
        shown: layers whose weights are shown.
        deviations: planned layers whose palette has other settings.
        versions: packages with their versions, by what they did.
        missing: what no input was given for.
    """

    name: str
    tool_version: str
    model: PalettizedModel
    checkpoint_bytes: int
    account: Account
    metric_name: str
    fp32: float | None
    hard: float | None
    layers: tuple[Layer, ...]
    dense: tuple[Dense, ...]
    targets: tuple[Target, ...]
    metrics: Metrics | None
    check: Report | None
    plan: Plan | None
    deviations: tuple[str, ...]
    shown: tuple[Distribution, ...]
    versions: tuple[tuple[str, dict[str, str]], ...]
    files: tuple[File, ...]
    missing: tuple[Missing, ...]

    @property
    def fp32_bytes(self) -> int:
        """All weights and buffers before compression."""
        return self.model.fp32_bytes

    @property
    def ratio(self) -> float:
        """How many times smaller the checkpoint is."""
        return self.fp32_bytes / self.checkpoint_bytes


def gather(sources: Sources, layers: Sequence[str] = ()) -> Content:
    """Make the content of a report.

    Args:
        sources: its inputs.
        layers: shell-style patterns of parameter names whose weights are shown; by default the
            largest palettes.

    Raises:
        InvalidInput: when a pattern fits no palette.
    """
    model, check, metrics = sources.model, sources.check, sources.metrics
    names = (metrics.metric if metrics else None, check.metric_name if check else None)
    return Content(
        name=model.source.name,
        tool_version=__version__,
        model=model,
        checkpoint_bytes=sources.checkpoint.bytes,
        account=account(model, sources.checkpoint.bytes),
        metric_name=next(filter(None, names), "metric"),
        fp32=model.metrics.get("fp32"),
        hard=model.metrics.get("hard"),
        layers=tuple(_layer(name, palette, model) for name, palette in model.palettes.items()),
        dense=tuple(
            Dense(name, tuple(x.shape), str(x.dtype).removeprefix("torch."), x.nbytes)
            for name, x in model.dense.items()
        ),
        targets=tuple(_targets(sources)),
        metrics=metrics,
        check=check,
        plan=sources.plan,
        deviations=tuple(_deviations(sources.plan, model)) if sources.plan else (),
        shown=tuple(distribution(x, model.palettes[x]) for x in _choose(model, layers)),
        versions=tuple(_versions(sources)),
        files=tuple(_files(sources)),
        missing=tuple(_missing(sources)),
    )


def _layer(name: str, palette: Palette, model: PalettizedModel) -> Layer:
    layout = palette.layout
    return Layer(
        name=name,
        shape=layout.shape,
        bits=palette.bits,
        dim=layout.dim,
        axis=layout.axis,
        groups=layout.groups,
        weights=layout.size,
        indices=palette.packed.nbytes,
        lut=palette.lut.nbytes,
        used=used_centroids(palette),
        centroids=layout.groups << palette.bits,
        tied=tuple(other for other, owner in model.ties.items() if owner == name),
    )


def _choose(model: PalettizedModel, patterns: Sequence[str]) -> list[str]:
    """Names of palettes, in the order of the model."""
    names = list(model.palettes)
    if not patterns:
        largest = sorted(names, key=lambda name: -model.palettes[name].layout.size)[:_CHOSEN]
        return [name for name in names if name in largest]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise InvalidInput(f"--layer {pattern} fits no palette, such as {some or 'none'}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _targets(sources: Sources) -> Iterator[Target]:
    checked = (
        {artifact.path: artifact for artifact in sources.check.artifacts} if sources.check else {}
    )
    exported = sources.manifest.artifacts if sources.manifest else ()
    for artifact in exported or checked.values():
        found = checked.get(artifact.path)
        limit = found.max_bytes if found else None
        yield Target(
            target=artifact.target,
            path=artifact.path,
            # a limit is of the files that were checked
            bytes=found.bytes if found else artifact.bytes,
            limit=round(limit.value) if limit else None,
            checked=status_of(found.findings) if found else None,
        )


def _deviations(plan: Plan, model: PalettizedModel) -> Iterator[str]:
    for layer in plan.layers:
        palette = model.palettes.get(layer.name)
        found = (palette.bits, palette.layout.dim, palette.layout.groups) if palette else None
        planned = (layer.bits, layer.dim, layer.groups) if layer.bits else None
        if found != planned:
            yield layer.name


def _versions(sources: Sources) -> Iterator[tuple[str, dict[str, str]]]:
    if sources.manifest:
        tool = {"dkm-export": sources.manifest.tool_version}
        yield "exported with", tool | sources.manifest.dependencies
    if sources.check:
        yield f"checked on {sources.check.machine} with", sources.check.checked_with
    yield "reported with", {"dkm-export": __version__}


def _files(sources: Sources) -> Iterator[File]:
    checkpoint = sources.checkpoint
    yield File(checkpoint.path, checkpoint.bytes, checkpoint.sha256, READ)
    if sources.manifest:
        exported = sources.manifest.artifacts
        listed = [sources.manifest.samples, *(file for entry in exported for file in entry.files)]
        for entry, found in zip(listed, sources.files, strict=True):
            now = found or entry
            state = GONE if found is None else AS_EXPORTED if found == entry else CHANGED
            yield File(now.path, now.bytes, now.sha256, state)
    elif sources.check:
        for artifact in sources.check.artifacts:
            for entry in artifact.files:
                yield File(entry.path, entry.bytes, entry.sha256, AS_CHECKED)


def _missing(sources: Sources) -> Iterator[Missing]:
    check, manifest = sources.check, sources.manifest
    if sources.metrics is None:
        how = "`--run RUN` adds" if manifest else "the run's folder has no `metrics.json` with"
        yield Missing("accuracy by epoch", f"{how} what the training measured")
    if manifest is None and check is None:
        yield Missing("sizes of artifacts", "give the folder of `dkm export` instead of the run's")
    if check is None:
        yield Missing("not checked", "`--check FILE` adds what runtimes computed")
    elif manifest:
        paths = {artifact.path for artifact in check.artifacts}
        left = [entry.path for entry in manifest.artifacts if entry.path not in paths]
        if left:
            yield Missing(
                f"not checked: {', '.join(left)}", "the check was of other artifacts only"
            )
    if sources.plan is None:
        yield Missing("Pareto front", "`--plan FILE` adds what `dkm plan --json` printed")


def ran(check: Report) -> int:
    """How many runtimes computed something."""
    return sum(runtime.status is not Status.NOT_RUN for runtime in check.runtimes)
