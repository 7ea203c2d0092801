"""Check an export: structure, fidelity to PyTorch on every runtime, and the task's metric.

Two questions are kept apart. Fidelity compares a runtime with PyTorch on the same hard-assigned
weights: tight limits, and a miss is a bug. What compression cost compares PyTorch with PyTorch,
on the task's metric: a budget.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from dkm_export import __version__
from dkm_export.checking.bridge import connect
from dkm_export.checking.execution import check_runtime, not_run
from dkm_export.checking.gates import ALL, Gates, Threshold
from dkm_export.checking.metrics import Limits, compare, sensitivity, violations
from dkm_export.checking.reference import Reference, make_reference
from dkm_export.checking.report import Finding, Report, failed, passed
from dkm_export.checking.runtime import NumericClass, Runtime
from dkm_export.checking.structure import check_artifact, check_contents, check_hashes
from dkm_export.checkpoint import load_checkpoint
from dkm_export.errors import InvalidInput
from dkm_export.exporting.exporter import Exporter
from dkm_export.files import MANIFEST, sha256
from dkm_export.manifest import Artifact, Manifest, read_manifest
from dkm_export.plugins import EXPORTERS, RUNTIMES, discover, select
from dkm_export.quiet import quiet
from dkm_export.samples import load_samples

_LEAST_SENSITIVITY = 0.02
"""Below it, outputs hardly depend on the inputs and agreement would prove nothing."""


def check(
    path: Path,
    *,
    runtimes: Sequence[str] = (),
    required: Sequence[str] = (),
    devices: Sequence[str] = (),
    device_runner: Path | None = None,
    gates: Gates = Gates(),  # noqa: B008 it is frozen
    data: Mapping[str, Any] | None = MappingProxyType({}),
    progress: Callable[[str], None] = lambda message: None,
    verbose: bool = False,
) -> Report:
    """Check an export folder, or one artifact inside of it.

    Args:
        path: the folder of `dkm export`, or a path below it that is an artifact.
        runtimes: names of the runtimes to use; by default all that fit the artifacts, of which
            those that are `only_named` do not run.
        required: runtimes that must run, or the report's exit code says so.
        devices: addresses of devices, ``adb`` or ``adb:SERIAL``, on which the artifacts that they
            can run must run too.
        device_runner: program for these devices that runs artifacts there.
        gates: the thresholds, by default the built-in limits and no others.
        data: arguments of the task that are others here than when the model was trained, such as
            where its data are; None checks without the task and its metric.
        progress: called with a line before each step that takes a while.
        verbose: let the libraries print what they want to.

    Raises:
        InvalidInput: when there is no export at ``path``, its checkpoint or samples are malformed,
            or the name of a runtime, a device or a gate's target is unknown or fits no artifact.
        Unsupported: when there is no device, or nothing here that reaches one.
    """
    root, manifest, artifacts = locate(path)
    _require_targets(gates, artifacts)
    chosen = choose(artifacts, runtimes, required)
    connected = connect(devices, device_runner)
    _require_fitting(artifacts, connected)
    chosen += connected
    required = (*required, *(device.name for device in connected))
    progress("pytorch: reference")
    model = load_checkpoint(root / manifest.checkpoint.path)
    samples = load_samples(root / manifest.samples.path, model.source)
    reference = make_reference(model, samples, data)
    findings = [
        check_hashes(root, (manifest.checkpoint, manifest.samples)),
        check_contents(manifest, model),
        _check_samples(reference, gates.limits[NumericClass.FP32]),
    ]
    if gates.max_drop is not None:
        findings.append(_check_drop(reference, gates.max_drop))
    structures, runs = [], []
    exporters: dict[str, Exporter[Any]] = discover(EXPORTERS)
    for artifact in artifacts:
        progress(f"{artifact.target}: structure")
        (exporter,) = select(exporters, [artifact.target], "target")
        with quiet(enabled=not verbose):
            size = gates.size_limit(artifact.target)
            structures.append(check_artifact(root, artifact, exporter, model, size))
        for runtime in (runtime for runtime in chosen if runtime.target == artifact.target):
            if runtime.only_named and runtime.name not in (*runtimes, *required):
                runs.append(
                    not_run(runtime, f"{runtime.only_named}: --require {runtime.name} runs it")
                )
                continue
            if not runtime.unavailable():
                progress(f"{runtime.name}: {runtime.where}")
            with quiet(enabled=not verbose):
                runs.append(check_runtime(root / artifact.path, runtime, reference, gates))
    return Report(
        name=model.source.name,
        versions={"dkm-export": manifest.tool_version} | manifest.dependencies,
        checked_with=_versions(),
        machine=f"{platform.system()} {platform.machine()}",
        checkpoint_sha256=sha256(root / manifest.checkpoint.path),
        fp32_bytes=model.fp32_bytes,
        metric_name=reference.task.metric_name if reference.task else None,
        metrics=reference.metrics,
        max_drop=gates.max_drop,
        reference=tuple(findings),
        artifacts=tuple(structures),
        runtimes=tuple(runs),
        required=tuple(required),
        selected=tuple(_selected(artifacts, chosen if runtimes else None)),
    )


def locate(path: Path) -> tuple[Path, Manifest, list[Artifact]]:
    """The export's folder, its manifest, and the artifacts that ``path`` names: one, or all.

    Raises:
        InvalidInput: when ``path`` is neither an export nor an artifact of one.
    """
    path = path.resolve()
    for root in (path, *path.parents):
        if (root / MANIFEST).is_file():
            break
    else:
        raise InvalidInput(f"{path}: no {MANIFEST} here or above: give the folder of `dkm export`")
    manifest = read_manifest(root)
    artifacts = [entry for entry in manifest.artifacts if path in (root, root / entry.path)]
    if not artifacts:
        known = ", ".join(entry.path for entry in manifest.artifacts)
        raise InvalidInput(f"{path} is no artifact of {root}: choose from {known}")
    return root, manifest, artifacts


def choose(
    artifacts: Sequence[Artifact], runtimes: Sequence[str], required: Sequence[str]
) -> list[Runtime]:
    """The runtimes of these names, or all; ``required`` ones are among them.

    Raises:
        InvalidInput: when a name is unknown or its runtime fits no artifact.
    """
    known: dict[str, Runtime] = discover(RUNTIMES)
    named: list[Runtime] = select(known, [*runtimes, *required], "runtime")
    _require_fitting(artifacts, named)
    return named if runtimes else list(known.values())


def _require_fitting(artifacts: Sequence[Artifact], runtimes: Sequence[Runtime]) -> None:
    targets = [artifact.target for artifact in artifacts]
    for runtime in runtimes:
        if runtime.target not in targets:
            raise InvalidInput(
                f"runtime '{runtime.name}' runs {runtime.target} artifacts, "
                f"and here are only: {', '.join(targets)}"
            )


def _selected(artifacts: Sequence[Artifact], chosen: Sequence[Runtime] | None) -> Iterator[str]:
    """Targets that have to run: all, or those of the runtimes that the user has chosen."""
    for artifact in artifacts:
        if chosen is None or any(runtime.target == artifact.target for runtime in chosen):
            yield artifact.target


def _versions() -> dict[str, str]:
    return {
        "dkm-export": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _require_targets(gates: Gates, artifacts: Sequence[Artifact]) -> None:
    """A gate that has nothing to look at would pass unseen."""
    targets = [artifact.target for artifact in artifacts]
    for target, limit in gates.max_bytes.items():
        if target not in (ALL, *targets):
            raise InvalidInput(
                f"{limit.source}: max_bytes is set for '{target}', "
                f"and the artifacts here are: {', '.join(targets)}"
            )


def _check_samples(reference: Reference, limits: Limits) -> Finding:
    """The samples are what this checkpoint computes, and can tell right from wrong."""
    shipped = [tensor.numpy() for tensor in reference.samples.outputs]
    names = reference.model.source.outputs
    for name, theirs, ours in zip(names, shipped, reference.outputs, strict=True):
        if theirs.shape != ours.shape:
            return failed("samples", f"{name}: shape {theirs.shape}, expected {ours.shape}")
        broken = violations(compare(theirs, ours, limits), limits)
        if broken:
            return failed("samples", f"{name}: the checkpoint computes something else: {broken[0]}")
        share = sensitivity(ours)
        if not share >= _LEAST_SENSITIVITY:
            return failed(
                "samples",
                f"{name}: only {share:.1%} of the output depends on the input, at least "
                f"{_LEAST_SENSITIVITY:.0%} is needed to tell right from wrong: "
                "use trained or well-scaled weights, and samples that differ",
            )
    return passed("samples", f"{len(reference.samples)} samples, reproduced by the checkpoint")


def _check_drop(reference: Reference, limit: Threshold) -> Finding:
    fp32, hard = (reference.metrics.get(name) for name in ("fp32", "hard"))
    if fp32 is None or hard is None:
        raise InvalidInput(
            f"{limit.source}: a largest drop needs a checkpoint compressed with a task, and its "
            "data"
        )
    message = (
        f"{hard:.2f} after compression, {fp32:.2f} before, "
        f"may fall by {limit.value:g} ({limit.source})"
    )
    return (passed if fp32 - hard <= limit.value else failed)("accuracy", message)
