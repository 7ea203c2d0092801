"""Does a runtime compute what PyTorch computes? One artifact on one runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dkm_export.checking.gates import Gates
from dkm_export.checking.localisation import localise
from dkm_export.checking.metrics import (
    Fidelity,
    Limits,
    agreement,
    compare,
    violations,
)
from dkm_export.checking.reference import Outputs, Reference
from dkm_export.checking.report import Finding, RuntimeReport, Status, failed, passed, worst
from dkm_export.checking.runtime import NumericClass, Runtime, Session
from dkm_export.errors import DkmError, InvalidInput, Unsupported
from dkm_export.samples import fixed_batches
from dkm_export.task import Task, metric_of


def check_runtime(
    path: Path, runtime: Runtime, reference: Reference, gates: Gates
) -> RuntimeReport:
    """Run the samples and the task's test split, and compare with PyTorch."""
    version = None
    try:
        reason = runtime.unavailable()
        if reason:
            raise Unsupported(reason)
        version = runtime.reported_version()
        update = _run(path, runtime, reference, gates)
        return _report(runtime, version=version).model_copy(update=update)
    except Unsupported as error:
        return not_run(runtime, str(error))
    except Exception as error:  # a runtime raises anything
        summary = str(error).strip().partition("\n")[0]
        message = summary if isinstance(error, DkmError) else f"{type(error).__name__}: {summary}"
        finding = Finding(check="run", status=Status.ERROR, message=message)
        return _report(runtime, finding, version=version)


def not_run(runtime: Runtime, reason: str) -> RuntimeReport:
    """The report of a runtime that did not run, and why."""
    return _report(runtime, Finding(check="run", status=Status.NOT_RUN, message=reason))


def _report(runtime: Runtime, *findings: Finding, version: str | None = None) -> RuntimeReport:
    return RuntimeReport(
        runtime=runtime.name,
        target=runtime.target,
        where=runtime.where,
        version=version,
        findings=findings,
    )


def _run(path: Path, runtime: Runtime, reference: Reference, gates: Gates) -> Mapping[str, object]:
    """The fields of the report that come from running."""
    session = runtime.load(path)
    limits = gates.limits[session.numeric_class]
    outputs = _run_samples(session, reference)
    fidelity = {
        name: compare(expected, output, limits)
        for name, expected, output in zip(
            reference.model.source.outputs, reference.outputs, outputs, strict=True
        )
    }
    findings = list(_check_fidelity(fidelity, limits))
    if worst(findings) is Status.FAIL:
        sample = reference.samples.input(_worst_sample(outputs, reference, limits))
        findings.append(localise(path, runtime, reference.model, sample, limits.relative_l2))
    findings.append(_check_controls(outputs, reference, limits, session.numeric_class))
    metric, predictions = None, None
    if reference.task is not None:
        metric, predictions, finding = _check_task(
            session, reference, reference.task, limits, runtime.test_seconds
        )
        findings.append(finding)
    return {
        "findings": tuple(findings),
        "numeric_class": session.numeric_class.value,
        "limits": limits,
        "fidelity": fidelity,
        "predictions": predictions,
        "metric": metric,
    }


def _run_samples(session: Session, reference: Reference) -> Outputs:
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


def _check_fidelity(fidelity: Mapping[str, Fidelity], limits: Limits) -> Iterator[Finding]:
    for name, measured in fidelity.items():
        broken = violations(measured, limits)
        if broken:
            yield failed("fidelity", f"{name}: {'; '.join(broken)}")
        else:
            figure = f"relative L2 {measured.relative_l2:.1e}, at most {limits.relative_l2:g}"
            yield passed("fidelity", f"{name}: {figure}{limits.set_by('relative_l2')}")


def _worst_sample(outputs: Outputs, reference: Reference, limits: Limits) -> int:
    """The index of the sample with the largest error in any output."""
    errors = [
        [compare(*pair, limits).relative_l2 for pair in zip(expected, output, strict=True)]
        for expected, output in zip(reference.outputs, outputs, strict=True)
    ]
    return int(np.max(errors, axis=0).argmax())


def _check_controls(
    outputs: Outputs, reference: Reference, limits: Limits, numeric_class: NumericClass
) -> Finding:
    """A change in one place has to break the limits, or staying within them means nothing.

    Not in every layer: some hardly matter to the outputs, which is no fault of the artifact. One
    index or bias of many is below what float16 rounds, so only float32 has to notice them at all.
    """

    def notices(control: Outputs) -> bool:
        return any(
            violations(compare(wrong, output[:1], limits), limits)
            for wrong, output in zip(control, outputs, strict=True)
        )

    parts, blind = [], False
    for changed, controls in reference.controls.items():
        if not controls:  # no layer has a bias
            continue
        missed = [name for name, control in controls.items() if not notices(control)]
        part = f"one {changed} in {len(controls) - len(missed)} of {len(controls)} layers"
        if changed == "LUT entry":
            part += f" (not {', '.join(missed)})" if missed else ""
            blind |= 2 * len(missed) > len(controls)
        elif numeric_class is NumericClass.FP32:
            blind |= len(missed) == len(controls)
        parts.append(part)
    message = f"notices a change of {', '.join(parts)}"
    return (failed if blind else passed)("negative control", message)


def _check_task(
    session: Session,
    reference: Reference,
    task: Task,
    limits: Limits,
    seconds: float | None,
) -> tuple[float | None, Fidelity, Finding]:
    """The task's metric on the runtime, and whether its outputs lead to PyTorch's predictions.

    The metric is None where the time did not suffice for the whole test split.
    """
    assert reference.test_outputs is not None
    output, targets = _run_task(session, reference, task, seconds)
    count, everything = len(targets), len(reference.test_outputs)
    expected = reference.test_outputs[:count]
    if output.shape != expected.shape:
        raise InvalidInput(f"the test outputs are {output.shape}, expected {expected.shape}")
    whole = count == everything
    metric = metric_of(task, torch.from_numpy(output), targets) if whole else None
    part = f"the first {count} of {everything} test inputs"
    measured = compare(expected, output, limits)
    broken = violations(measured, limits)
    if broken:
        over = "the test split" if whole else part
        return metric, measured, failed("predictions", f"over {over}: {'; '.join(broken)}")
    agreed = agreement(expected, output, limits)
    if agreed is None:
        over = "the whole test split" if whole else part
        return metric, measured, passed("predictions", f"within the limits over {over}")
    of = f"{count}" if whole else part
    message = f"{agreed.differing} of {of} differ, {agreed.ties} more within a tie"
    return metric, measured, (failed if agreed.differing else passed)("predictions", message)


def _run_task(
    session: Session, reference: Reference, task: Task, seconds: float | None
) -> tuple[npt.NDArray[Any], torch.Tensor]:
    """Outputs and targets of the test split, or of as many batches as there is time for."""
    source = reference.model.source
    names = [spec.name for spec in source.inputs]
    rows, targets = [], []
    end = None if seconds is None else monotonic() + seconds
    for inputs, target in fixed_batches(task, source):
        arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        rows.append(session.run(arrays)[0][: len(target)])
        targets.append(target)
        if end is not None and monotonic() > end:
            break
    return np.concatenate(rows), torch.cat(targets)
