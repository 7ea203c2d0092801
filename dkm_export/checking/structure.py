"""Is an export what its manifest and its checkpoint say? Nothing is run here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dkm_export.checking.gates import Threshold
from dkm_export.checking.report import ArtifactReport, Finding, Status, failed, passed, worst
from dkm_export.errors import DkmError
from dkm_export.exporting.export import palette_problems
from dkm_export.exporting.exporter import Exporter
from dkm_export.files import sha256
from dkm_export.manifest import Artifact, Contents, FileEntry, Manifest
from dkm_export.palettized import PalettizedModel


def check_hashes(root: Path, entries: Sequence[FileEntry]) -> Finding:
    """Every file is there and is the one that was exported."""
    for entry in entries:
        file = root / entry.path
        if not file.is_file():
            return failed("structure", f"{entry.path} is missing")
        if sha256(file) != entry.sha256:
            return failed("structure", f"{entry.path} is not the file that was exported")
    return passed("structure", f"{len(entries)} files have the hashes of the manifest")


def check_contents(manifest: Manifest, model: PalettizedModel) -> Finding:
    """The manifest describes this checkpoint."""
    actual = Contents.of(model).model_dump()
    for key, value in manifest.contents.model_dump().items():
        if value != actual[key]:
            return failed("structure", f"the manifest's '{key}' is not the checkpoint's")
    return passed("structure", "the manifest describes the checkpoint")


def check_artifact(
    root: Path,
    artifact: Artifact,
    exporter: Exporter[Any],
    model: PalettizedModel,
    max_bytes: Threshold | None,
) -> ArtifactReport:
    """The files are those of the manifest, every palette in them is the checkpoint's, no excess."""
    path = root / artifact.path
    files = exporter.files(path) if path.exists() else []
    entries = tuple(FileEntry.of(file, root) for file in files)
    size = sum(entry.bytes for entry in entries)
    findings = [*_check_files(root, artifact, entries), *_check_palettes(path, exporter, model)]
    notes = tuple(exporter.notes(path)) if worst(findings) is Status.PASS else ()
    if max_bytes is not None:
        findings.append(_check_size(size, max_bytes))
    return ArtifactReport(
        target=artifact.target,
        path=artifact.path,
        bytes=size,
        max_bytes=max_bytes,
        files=entries,
        findings=tuple(findings),
        notes=notes,
    )


def _check_size(size: int, limit: Threshold) -> Finding:
    message = f"{size:,} B, at most {limit.value:,.0f} B ({limit.source})"
    return (passed if size <= limit.value else failed)("size", message)


def _check_files(root: Path, artifact: Artifact, files: Sequence[FileEntry]) -> Iterator[Finding]:
    listed = {entry.path for entry in artifact.files}
    for file in files:
        if file.path not in listed:
            yield failed("structure", f"{file.path} is not in the manifest")
    yield check_hashes(root, artifact.files)


def _check_palettes(
    path: Path, exporter: Exporter[Any], model: PalettizedModel
) -> Iterator[Finding]:
    reason = exporter.unavailable()
    if reason:
        yield Finding(check="structure", status=Status.NOT_RUN, message=reason)
        return
    try:
        found = exporter.read_palettes(path)
    except DkmError as error:
        yield failed("structure", str(error))
        return
    problems = palette_problems(model, found)
    yield from (failed("structure", problem) for problem in problems)
    if not problems:
        yield passed("structure", f"{len(found)} palettes equal the checkpoint bit for bit")
