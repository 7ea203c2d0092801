"""Check an export: structure, fidelity to PyTorch on every runtime, and the task's metric.

Two questions are kept apart. Fidelity compares a runtime with PyTorch on the same hard-assigned
weights: tight limits, and a miss is a bug. What compression cost compares PyTorch with PyTorch,
on the task's metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dkm_export.checking.metrics import (
    LIMITS,
    Limits,
    agreement,
    compare,
    sensitivity,
    violations,
)
from dkm_export.checking.reference import Outputs, Reference, make_reference
from dkm_export.checking.report import ArtifactReport, Finding, Report, RuntimeReport, Status
from dkm_export.checking.runtime import NumericClass, Runtime, Session
from dkm_export.checkpoint import load_checkpoint
from dkm_export.errors import DkmError, InvalidInput
from dkm_export.exporting.export import palette_problems
from dkm_export.exporting.exporter import Exporter
from dkm_export.files import files_below, sha256
from dkm_export.manifest import FILE_NAME, Artifact, FileEntry, Manifest, read_manifest
from dkm_export.palettized import PalettizedModel
from dkm_export.plugins import EXPORTERS, RUNTIMES, discover, select
from dkm_export.quiet import quiet
from dkm_export.samples import fixed_batches, load_samples
from dkm_export.task import Task

_LEAST_SENSITIVITY = 0.02
"""Below it, outputs hardly depend on the inputs and agreement would prove nothing."""


def check(
    path: Path,
    *,
    runtimes: Sequence[str] = (),
    required: Sequence[str] = (),
    progress: Callable[[str], None] = lambda message: None,
    verbose: bool = False,
) -> Report:
    """Check an export folder, or one artifact inside of it.

    Args:
        path: the folder of `dkm export`, or a path below it that is an artifact.
        runtimes: names of the runtimes to use; all that fit the artifacts by default.
        required: runtimes that must run, or the report's exit code says so.
        progress: called with a line before each step that takes a while.
        verbose: let the libraries print what they want to.

    Raises:
        InvalidInput: when there is no export at ``path``, its checkpoint or samples are malformed,
            or a runtime's name is unknown.
    """
    root, manifest, artifacts = _locate(path)
    known: dict[str, Runtime] = discover(RUNTIMES)
    select(known, required, "runtime")
    chosen: list[Runtime] = select(known, [*runtimes, *required] if runtimes else known, "runtime")
    if runtimes:
        targets = {runtime.target for runtime in chosen}
        artifacts = [artifact for artifact in artifacts if artifact.target in targets]
    progress("pytorch: reference")
    model = load_checkpoint(root / manifest.checkpoint.path)
    reference = make_reference(model, load_samples(root / manifest.samples.path, model.source))
    structures, runs = [], []
    exporters: dict[str, Exporter[Any]] = discover(EXPORTERS)
    for artifact in artifacts:
        progress(f"{artifact.target}: structure")
        exporter = select(exporters, [artifact.target], "target")[0]
        with quiet(enabled=not verbose):
            structure = _check_structure(root, artifact, exporter, model)
        structures.append(structure)
        for runtime in (r for r in chosen if r.target == artifact.target):
            progress(f"{runtime.name}: {runtime.where}")
            with quiet(enabled=not verbose):
                runs.append(_check_runtime(root / artifact.path, runtime, reference))
    return Report(
        name=manifest.name,
        versions={"dkm-export": manifest.tool_version} | manifest.dependencies,
        checkpoint_sha256=sha256(root / manifest.checkpoint.path),
        fp32_bytes=manifest.fp32_bytes,
        metric_name=reference.task.metric_name if reference.task else None,
        metrics=reference.metrics,
        reference=(
            _check_hashes(root, (manifest.checkpoint, manifest.samples)),
            _check_samples(reference),
        ),
        artifacts=tuple(structures),
        runtimes=tuple(runs),
        required=tuple(required),
    )


def _locate(path: Path) -> tuple[Path, Manifest, list[Artifact]]:
    path = path.resolve()
    for root in (path, *path.parents):
        if (root / FILE_NAME).is_file():
            break
    else:
        raise InvalidInput(f"{path}: no {FILE_NAME} here or above: give the folder of `dkm export`")
    manifest = read_manifest(root)
    artifacts = [a for a in manifest.artifacts if path in (root, root / a.path)]
    if not artifacts:
        known = ", ".join(artifact.path for artifact in manifest.artifacts)
        raise InvalidInput(f"{path} is no artifact of {root}: choose from {known}")
    return root, manifest, artifacts


def _check_hashes(root: Path, entries: Sequence[FileEntry]) -> Finding:
    for entry in entries:
        file = root / entry.path
        if not file.is_file():
            return _fail("structure", f"{entry.path} is missing")
        if sha256(file) != entry.sha256:
            return _fail("structure", f"{entry.path} is not the file that was exported")
    return _pass("structure", f"{len(entries)} files have the hashes of the manifest")


def _check_samples(reference: Reference) -> Finding:
    """The samples are what this checkpoint computes, and can tell right from wrong."""
    limits = LIMITS[NumericClass.FP32]
    for name, shipped, ours in _outputs(reference, reference.outputs):
        broken = violations(compare(shipped, ours, limits), limits)
        if broken:
            return _fail("samples", f"{name}: the checkpoint computes something else: {broken[0]}")
        share = sensitivity(ours)
        if share < _LEAST_SENSITIVITY:
            return _fail(
                "samples",
                f"{name}: only {share:.1%} of the output depends on the input, at least "
                f"{_LEAST_SENSITIVITY:.0%} is needed to tell right from wrong: "
                "use trained or well-scaled weights",
            )
    return _pass("samples", f"{len(reference.samples)} samples, reproduced by the checkpoint")


def _check_structure(
    root: Path, artifact: Artifact, exporter: Exporter[Any], model: PalettizedModel
) -> ArtifactReport:
    def findings() -> Iterator[Finding]:
        path = root / artifact.path
        listed = {entry.path for entry in artifact.files}
        for file in files_below(path) if path.exists() else []:
            if file.relative_to(root).as_posix() not in listed:
                yield _fail("structure", f"{file.relative_to(root)} is not in the manifest")
        yield _check_hashes(root, artifact.files)
        reason = exporter.unavailable()
        if reason:
            yield Finding(check="structure", status=Status.NOT_RUN, message=reason)
            return
        try:
            found = exporter.read_palettes(path)
        except DkmError as error:
            yield _fail("structure", str(error))
            return
        problems = palette_problems(model, found)
        yield from (_fail("structure", problem) for problem in problems)
        if not problems:
            yield _pass("structure", f"{len(found)} palettes equal the checkpoint bit for bit")

    return ArtifactReport(
        target=artifact.target,
        path=artifact.path,
        bytes=artifact.bytes,
        findings=tuple(findings()),
    )


def _check_runtime(path: Path, runtime: Runtime, reference: Reference) -> RuntimeReport:
    report = RuntimeReport(
        runtime=runtime.name, target=runtime.target, where=runtime.where, findings=()
    )
    reason = runtime.unavailable()
    if reason:
        not_run = Finding(check="run", status=Status.NOT_RUN, message=reason)
        return report.model_copy(update={"findings": (not_run,)})
    try:
        session = runtime.load(path)
        limits = LIMITS[session.numeric_class]
        outputs = _run_session(session, reference)
        findings = [*_check_fidelity(outputs, reference, limits)]
        findings.append(_check_control(outputs, reference, limits))
        metric = None
        if reference.task is not None:
            metric, finding = _check_task(session, reference, reference.task, limits)
            findings.append(finding)
    except Exception as error:  # a runtime raises anything
        summary = str(error).strip().partition("\n")[0]
        message = summary if isinstance(error, DkmError) else f"{type(error).__name__}: {summary}"
        failed = Finding(check="run", status=Status.ERROR, message=message)
        return report.model_copy(update={"findings": (failed,)})
    return report.model_copy(
        update={
            "findings": tuple(findings),
            "numeric_class": session.numeric_class.value,
            "limits": limits,
            "fidelity": {
                name: compare(expected, output, limits)
                for name, expected, output in _outputs(reference, outputs)
            },
            "metric": metric,
        }
    )


def _run_session(session: Session, reference: Reference) -> list[npt.NDArray[Any]]:
    samples = reference.samples
    results = []
    for index in range(len(samples)):
        inputs = {name: tensor.numpy() for name, tensor in samples.input(index).items()}
        outputs = session.run(inputs)
        expected = [tuple(stacked[index].shape) for stacked in samples.outputs]
        found = [output.shape for output in outputs]
        if found != expected:
            raise InvalidInput(f"outputs have shapes {found}, expected {expected}")
        results.append(outputs)
    return [np.stack(stacked) for stacked in zip(*results, strict=True)]


def _check_fidelity(outputs: Outputs, reference: Reference, limits: Limits) -> Iterator[Finding]:
    for name, expected, output in _outputs(reference, outputs):
        fidelity = compare(expected, output, limits)
        broken = violations(fidelity, limits)
        if broken:
            yield _fail("fidelity", f"{name}: {'; '.join(broken)}")
        else:
            yield _pass("fidelity", f"{name}: relative L2 {fidelity.relative_l2:.1e}")


def _check_control(outputs: Outputs, reference: Reference, limits: Limits) -> Finding:
    """One changed LUT entry has to break the limits, or passing them means nothing."""
    noticed = any(
        violations(compare(wrong, output, limits), limits)
        for wrong, output in zip(reference.control, outputs, strict=True)
    )
    layer = reference.control_layer
    if noticed:
        return _pass("negative control", f"one changed LUT entry of {layer} is noticed")
    return _fail("negative control", f"one changed LUT entry of {layer} goes unnoticed")


def _check_task(
    session: Session, reference: Reference, task: Task, limits: Limits
) -> tuple[float, Finding]:
    """The task's metric on the runtime, and whether its predictions are PyTorch's."""
    source, expected = reference.model.source, reference.test_outputs
    assert expected is not None
    names = [spec.name for spec in source.inputs]
    rows, targets = [], []
    for inputs, target in fixed_batches(task, source):
        arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        rows.append(session.run(arrays)[0][: len(target)])
        targets.append(target)
    output = np.concatenate(rows)
    metric = task.metric(torch.from_numpy(output), torch.cat(targets))
    agreed = agreement(expected, output, limits)
    if agreed is None:
        return metric, _pass("predictions", f"{task.metric_name} {metric:.2f}")
    message = f"{agreed.differing} of {len(output)} differ, {agreed.ties} more within a tie"
    return metric, (_fail if agreed.differing else _pass)("predictions", message)


def _outputs(
    reference: Reference, outputs: Outputs
) -> Iterator[tuple[str, npt.NDArray[Any], npt.NDArray[Any]]]:
    """Each output's name, its reference over the samples, and ``outputs``."""
    shipped = [tensor.numpy() for tensor in reference.samples.outputs]
    return zip(reference.model.source.outputs, shipped, outputs, strict=True)


def _pass(check: Any, message: str) -> Finding:
    return Finding(check=check, status=Status.PASS, message=message)


def _fail(check: Any, message: str) -> Finding:
    return Finding(check=check, status=Status.FAIL, message=message)
