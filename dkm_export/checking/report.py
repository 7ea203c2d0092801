"""What a check found, as data, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from dkm_export.checking.metrics import Fidelity, Limits
from dkm_export.errors import ExitCode
from dkm_export.spec import Frozen


class Status(StrEnum):
    """Outcome of one check. ``NOT_RUN`` is never a pass."""

    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"
    NOT_RUN = "not_run"


Check = Literal[
    "structure", "samples", "accuracy", "fidelity", "predictions", "negative control", "run"
]


class Finding(Frozen):
    """One check: what it looked at, how it ended, and the figure or reason."""

    check: Check
    status: Status
    message: str


def passed(check: Check, message: str) -> Finding:
    """A finding that is as it should be."""
    return Finding(check=check, status=Status.PASS, message=message)


def failed(check: Check, message: str) -> Finding:
    """A finding that fails the check."""
    return Finding(check=check, status=Status.FAIL, message=message)


class ArtifactReport(Frozen):
    """Structure of one artifact: file hashes, and every palette against the checkpoint.

    Attributes:
        notes: what an app's developers should know of it; nothing that passes or fails.
    """

    target: str
    path: str
    bytes: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()


class RuntimeReport(Frozen):
    """One artifact on one runtime.

    Attributes:
        where: how the runtime ran: native, interpreted, emulated, or a device.
        numeric_class: decides ``limits``; None when nothing ran.
        limits: the limits of checks.
        fidelity: of each output over all samples, by output name.
        metric: the task's metric over its whole test split, or None without a task, or where the
            runtime is too slow for the whole.
        version: what computed, with its version; None when nothing ran.
    """

    runtime: str
    target: str
    where: str
    version: str | None = None
    findings: tuple[Finding, ...]
    numeric_class: str | None = None
    limits: Limits | None = None
    fidelity: dict[str, Fidelity] = Field(default_factory=dict)
    metric: float | None = None

    @property
    def status(self) -> Status:
        """The worst of the findings."""
        return worst(self.findings)


class Report(Frozen):
    """A whole check.

    Attributes:
        versions: of this tool and the packages that the artifacts were made with.
        checkpoint_sha256: of the checkpoint beside the artifacts, as it is now.
        reference: checks of the PyTorch reference itself.
        metric_name: what the task measures.
        metrics: the task's metric in PyTorch: ``fp32`` as recorded when the model was compressed,
            ``hard`` measured now.
        required: runtimes that have to run.
        selected: targets whose artifact has to run on at least one runtime.
    """

    schema_version: Literal[1] = 1
    name: str
    versions: dict[str, str]
    checkpoint_sha256: str
    fp32_bytes: int
    metric_name: str | None
    metrics: dict[str, float]
    reference: tuple[Finding, ...]
    artifacts: tuple[ArtifactReport, ...]
    runtimes: tuple[RuntimeReport, ...]
    required: tuple[str, ...]
    selected: tuple[str, ...]

    @property
    def suites(self) -> list[tuple[str, tuple[Finding, ...]]]:
        """The findings with what they belong to: PyTorch, a target or a runtime."""
        return [
            ("pytorch", self.reference),
            *((f"{artifact.target} file", artifact.findings) for artifact in self.artifacts),
            *((runtime.runtime, runtime.findings) for runtime in self.runtimes),
        ]

    @property
    def missing(self) -> list[str]:
        """Required runtimes that did not run, and artifacts that were not read or not run."""
        ran = [runtime for runtime in self.runtimes if runtime.status is not Status.NOT_RUN]
        runtimes, targets = {r.runtime for r in ran}, {r.target for r in ran}
        missing = [f"runtime {name} did not run" for name in self.required if name not in runtimes]
        missing += [
            f"the palettes of the {artifact.target} artifact were not read"
            for artifact in self.artifacts
            if worst(artifact.findings) is Status.NOT_RUN
        ]
        return missing + [
            f"no runtime ran the {target} artifact"
            for target in self.selected
            if target not in targets
        ]

    @property
    def exit_code(self) -> ExitCode:
        """3 when anything failed, 4 when something that has to run did not, else 0."""
        findings = [finding for _, suite in self.suites for finding in suite]
        if worst(findings) in (Status.FAIL, Status.ERROR):
            return ExitCode.GATE
        return ExitCode.UNSUPPORTED if self.missing else ExitCode.OK

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values, with the statuses that follow from it."""
        # by way of text, where pydantic writes null for the infinite error of a NaN
        data: dict[str, Any] = json.loads(self.model_dump_json())
        for entry, runtime in zip(data["runtimes"], self.runtimes, strict=True):
            entry["status"] = runtime.status.value
        return data | {"exit_code": int(self.exit_code), "missing": self.missing}


def worst(findings: Sequence[Finding]) -> Status:
    """Error before fail before not run before pass."""
    statuses = {finding.status for finding in findings}
    order = (Status.ERROR, Status.FAIL, Status.NOT_RUN)
    return next((status for status in order if status in statuses), Status.PASS)
