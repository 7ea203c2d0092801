"""The inputs of a report, read, and found to be of one and the same checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dkm_export.checking.report import ArtifactReport, Report, Status, read_report
from dkm_export.checkpoint import load_checkpoint
from dkm_export.errors import InvalidInput
from dkm_export.files import CHECKPOINT, MANIFEST, METRICS, require_inside, sha256
from dkm_export.manifest import Artifact, FileEntry, Manifest, read_manifest
from dkm_export.palettized import PalettizedModel
from dkm_export.planning.result import Plan
from dkm_export.training.metrics import Metrics, read_metrics
from dkm_export.validation import read_json, validated


@dataclass(frozen=True)
class Sources:
    """What a report is made of. All of it belongs to ``model``; None is what was not given.

    Attributes:
        checkpoint: size and hash of the file of ``model``.
        files: those of the manifest as they are now; None for one that is gone.
    """

    model: PalettizedModel
    checkpoint: FileEntry
    manifest: Manifest | None = None
    files: tuple[FileEntry | None, ...] = ()
    metrics: Metrics | None = None
    check: Report | None = None
    plan: Plan | None = None


def read_sources(
    subject: Path, *, run: Path | None = None, check: Path | None = None, plan: Path | None = None
) -> Sources:
    """Read the inputs of a report; no code of the model is run.

    Args:
        subject: folder of `dkm compress` or of `dkm export`.
        run: folder of `dkm compress`, when ``subject`` is an export.
        check: what `dkm check --json` printed.
        plan: what `dkm plan --json` printed.

    Raises:
        InvalidInput: when an input is missing or malformed, or is of another checkpoint.
    """
    exported = (subject / MANIFEST).is_file()
    if not exported and not (subject / CHECKPOINT).is_file():
        raise InvalidInput(
            f"{subject}: neither {MANIFEST} nor {CHECKPOINT} is in it: give the folder of "
            "`dkm compress` or of `dkm export`"
        )
    if run is not None and not exported:
        raise InvalidInput(f"--run goes with the folder of `dkm export`, and {subject} is none")
    manifest = read_manifest(subject) if exported else None
    file = subject / (manifest.checkpoint.path if manifest else CHECKPOINT)
    model = load_checkpoint(file)
    entry = FileEntry.of(file, subject)
    if manifest and manifest.checkpoint.sha256 != entry.sha256:
        raise InvalidInput(f"{file} is not the checkpoint of its {MANIFEST}: export it again")
    place = subject if manifest is None else run
    return Sources(
        model=model,
        checkpoint=entry,
        manifest=manifest,
        files=tuple(_measure(_listed(manifest), subject)) if manifest else (),
        metrics=_metrics(place, model, required=run is not None) if place else None,
        check=_check(check, model, subject, manifest) if check else None,
        plan=_plan(plan, model) if plan else None,
    )


def _listed(manifest: Manifest) -> Iterator[str]:
    yield manifest.samples.path
    for artifact in manifest.artifacts:
        yield from (entry.path for entry in artifact.files)


def _measure(paths: Iterable[str], root: Path) -> Iterator[FileEntry | None]:
    """The files as they are now; None for one that is not there."""
    for path in paths:
        file = root / path
        if file.is_file():
            require_inside(root, [file])
            yield FileEntry.of(file, root)
        else:
            yield None


def _metrics(run: Path, model: PalettizedModel, *, required: bool) -> Metrics | None:
    if required:
        checkpoint = run / CHECKPOINT
        if not checkpoint.is_file():
            raise InvalidInput(f"{run}: no {CHECKPOINT}: give the folder of `dkm compress`")
        _require_same(f"--run {run}", sha256(checkpoint), model)
    file = run / METRICS
    if not required and not file.exists():
        return None
    metrics = read_metrics(file)
    for name in ("fp32", "hard"):
        if getattr(metrics, name) != model.metrics.get(name):
            raise InvalidInput(f"{file}: '{name}' is not the one that the checkpoint beside it has")
    return metrics


def _check(file: Path, model: PalettizedModel, root: Path, manifest: Manifest | None) -> Report:
    report = read_report(file)
    _require_same(f"--check {file}", report.checkpoint_sha256, model)
    exported = {(x.target, x.path): x for x in manifest.artifacts} if manifest else {}
    for artifact in report.artifacts if manifest else ():
        here = exported.get((artifact.target, artifact.path))
        if here is None or not _is_of(artifact, here, root):
            raise InvalidInput(
                f"--check {file}: {artifact.path} is of another export there: check this one"
            )
    return report


def _is_of(checked: ArtifactReport, exported: Artifact, root: Path) -> bool:
    """Whether the files that were checked are the exported ones, or the wrong ones that are here.

    That they are not the manifest's may be what the check itself found.
    """
    if set(checked.files) == set(exported.files):
        return True
    if not any(x.check == "structure" and x.status is Status.FAIL for x in checked.findings):
        return False
    if not checked.files:  # where there is no artifact, a check lists nothing beside it either
        return not (root / exported.path).exists()
    paths = {entry.path for entry in (*exported.files, *checked.files)}
    return set(_measure(paths, root)) - {None} == set(checked.files)


def _plan(file: Path, model: PalettizedModel) -> Plan:
    way_out = "give a file of what `dkm plan --json` printed"
    data = read_json(file, way_out)
    if not isinstance(data, dict) or "plan" not in data:
        raise InvalidInput(f"{file}: no key 'plan': {way_out}")
    plan = validated(data["plan"], Plan, f"{file}: plan")
    if plan.model != model.source.name:
        raise InvalidInput(f"--plan {file} is of '{plan.model}', not of '{model.source.name}'")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.dense.items()}
    shapes |= {name: palette.layout.shape for name, palette in model.palettes.items()}
    for layer in plan.layers:
        if shapes.get(layer.name) != layer.shape:
            raise InvalidInput(
                f"--plan {file}: the checkpoint has no {layer.name} of shape {list(layer.shape)}"
            )
    return plan


def _require_same(owner: str, digest: str, model: PalettizedModel) -> None:
    if digest != model.sha256:
        raise InvalidInput(
            f"{owner} is of another checkpoint: its sha256 begins with {digest[:12]}, here it is "
            f"{model.sha256[:12]}"
        )
