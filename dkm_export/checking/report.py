"""What a check found, as data, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, computed_field, model_validator

from dkm_export.checking.gates import Threshold
from dkm_export.checking.metrics import Fidelity, Limits, Measured
from dkm_export.errors import ExitCode, InvalidInput
from dkm_export.manifest import FileEntry, Size
from dkm_export.spec import Frozen
from dkm_export.validation import read_json, validated


class Status(StrEnum):
    """Outcome of one check. ``NOT_RUN`` is never a pass."""

    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"
    NOT_RUN = "not_run"


Check = Literal[
    "structure",
    "size",
    "samples",
    "accuracy",
    "fidelity",
    "localisation",
    "predictions",
    "negative control",
    "run",
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
        bytes: of all its files together.
        max_bytes: the most that they may be, or None.
        files: sizes and hashes as they are now.
        notes: what an app's developers should know of it; nothing that passes or fails.
    """

    target: str
    path: str
    bytes: Size
    max_bytes: Threshold | None = None
    files: tuple[FileEntry, ...] = ()
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()


class RuntimeReport(Frozen):
    """One artifact on one runtime.

    Attributes:
        where: how the runtime ran: native, interpreted, emulated, or a device.
        numeric_class: decides ``limits``; None when nothing ran.
        limits: the limits of checks.
        fidelity: of each output over all samples, by output name.
        predictions: fidelity of the first output over the task's test split, or over as much of it
            as there was time for.
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
    predictions: Fidelity | None = None
    metric: float | None = None

    @model_validator(mode="after")
    def _measured_within_limits(self) -> Self:
        if (self.limits is None) is not (self.numeric_class is None):
            raise ValueError("'limits' and 'numeric_class' are of what ran: give both or none")
        if self.limits is None and (self.fidelity or self.predictions):
            raise ValueError("without 'limits' there are no 'fidelity' and no 'predictions'")
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def status(self) -> Status:
        """The worst of the findings."""
        return worst(self.findings)


class Report(Frozen):
    """A whole check.

    Attributes:
        versions: of this tool and the packages that the artifacts were made with.
        checked_with: versions of this tool and the packages that checked them.
        machine: operating system and processor that the check ran on.
        checkpoint_sha256: of the checkpoint beside the artifacts, as it is now.
        reference: checks of the PyTorch reference itself.
        metric_name: what the task measures.
        metrics: the task's metric in PyTorch: ``fp32`` as recorded when the model was compressed,
            ``hard`` measured now.
        max_drop: how far ``hard`` may be below ``fp32``, or None.
        required: runtimes that have to run.
        selected: targets whose artifact has to run on at least one runtime.
    """

    schema_version: Literal[1] = 1
    name: str
    versions: dict[str, str]
    checked_with: dict[str, str]
    machine: str
    checkpoint_sha256: str
    fp32_bytes: Size
    metric_name: str | None
    metrics: dict[str, Measured]
    max_drop: Threshold | None
    reference: tuple[Finding, ...]
    artifacts: tuple[ArtifactReport, ...]
    runtimes: tuple[RuntimeReport, ...]
    required: tuple[str, ...]
    selected: tuple[str, ...]

    @model_validator(mode="after")
    def _runtimes_of_the_artifacts(self) -> Self:
        targets = [artifact.target for artifact in self.artifacts]
        for runtime in self.runtimes:
            if runtime.target not in targets:
                raise ValueError(
                    f"runtime {runtime.runtime} is of target '{runtime.target}', and the artifacts "
                    f"are: {', '.join(targets)}"
                )
        return self

    @property
    def suites(self) -> list[tuple[str, tuple[Finding, ...]]]:
        """The findings with what they belong to: PyTorch, a target or a runtime."""
        return [
            ("pytorch", self.reference),
            *((f"{artifact.target} file", artifact.findings) for artifact in self.artifacts),
            *((runtime.runtime, runtime.findings) for runtime in self.runtimes),
        ]

    @property
    def idle(self) -> list[str]:
        """Required runtimes that did not run."""
        ran = {r.runtime for r in self.runtimes if r.status is not Status.NOT_RUN}
        return [name for name in self.required if name not in ran]

    @property
    def unchecked(self) -> list[str]:
        """What was not done of artifacts: not read, or not run on any runtime."""
        ran = {r.target for r in self.runtimes if r.status is not Status.NOT_RUN}
        unread = [
            f"the palettes of the {artifact.target} artifact were not read"
            for artifact in self.artifacts
            if worst(artifact.findings) is Status.NOT_RUN
        ]
        return unread + [
            f"no runtime ran the {target} artifact" for target in self.selected if target not in ran
        ]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def missing(self) -> list[str]:
        """Required runtimes that did not run, and artifacts that were not read or not run."""
        return [f"runtime {name} did not run" for name in self.idle] + self.unchecked

    @computed_field  # type: ignore[prop-decorator]
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
        return data


def read_report(file: Path) -> Report:
    """Read what `dkm check --json` printed.

    Raises:
        InvalidInput: when it is missing or malformed, or a status does not follow from findings.
    """
    way_out = "give a file of what `dkm check --json` printed"
    data = read_json(file, way_out)
    if not isinstance(data, dict) or "error" in data:
        raise InvalidInput(f"{file}: no report of a check: {way_out}")
    stated = _without(data, Report)
    runtimes = stated.get("runtimes")
    if isinstance(runtimes, list):
        stated["runtimes"] = [_without(entry, RuntimeReport) for entry in runtimes]
    report = validated(stated, Report, file)
    if report.to_json() != data:
        raise InvalidInput(f"{file}: was changed since `dkm check` printed it: {way_out}")
    return report


def _without(data: Any, model: type[Frozen]) -> Any:
    """An object without what ``model`` computes itself."""
    if not isinstance(data, dict):
        return data
    return {key: value for key, value in data.items() if key not in model.model_computed_fields}


def report_schema() -> str:
    """What `Report.to_json` gives, as a JSON Schema; ``report.schema.json`` beside this file."""
    schema = Report.model_json_schema(mode="serialization")
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(dialect | schema, indent=2) + "\n"


def merged(runtimes: Sequence[RuntimeReport]) -> list[RuntimeReport]:
    """One report for runtimes of a target that did not run for the same reason, with all names."""
    groups: dict[object, list[RuntimeReport]] = {}
    for runtime in runtimes:
        idle = runtime.status is Status.NOT_RUN
        key = (runtime.target, runtime.findings) if idle else runtime.runtime
        groups.setdefault(key, []).append(runtime)
    return [
        group[0].model_copy(update={"runtime": ", ".join(runtime.runtime for runtime in group)})
        for group in groups.values()
    ]


def worst(findings: Sequence[Finding]) -> Status:
    """Error before fail before not run before pass."""
    statuses = {finding.status for finding in findings}
    order = (Status.ERROR, Status.FAIL, Status.NOT_RUN)
    return next((status for status in order if status in statuses), Status.PASS)
