"""``manifest.json``: what an export folder holds, where it came from, and every file's hash."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, FiniteFloat, model_validator

from dkm_export.entry import PaletteEntry
from dkm_export.files import MANIFEST, sha256
from dkm_export.palettized import PalettizedModel
from dkm_export.spec import Frozen
from dkm_export.validation import read_json, validated


def _stays_inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in path:
        raise ValueError(f"path '{path}' leaves the folder of the manifest")
    return path


RelativePath = Annotated[str, AfterValidator(_stays_inside)]
Size = Annotated[int, Field(ge=0, lt=2**63)]


class FileEntry(Frozen):
    """One file: its path relative to the manifest, its size in bytes and its hash."""

    path: RelativePath
    bytes: Size
    sha256: str

    @classmethod
    def of(cls, file: Path, root: Path) -> FileEntry:
        """Measure ``file``, which lies below ``root``."""
        path = file.relative_to(root).as_posix()
        return cls(path=path, bytes=file.stat().st_size, sha256=sha256(file))


class Artifact(Frozen):
    """What one target produced: a file, or a folder such as an ``.mlpackage``.

    Attributes:
        options: the exporter's settings.
        bytes: of all its files together.
    """

    target: str
    path: RelativePath
    options: dict[str, Any]
    bytes: Size
    files: tuple[FileEntry, ...]

    @classmethod
    def of(
        cls, target: str, path: Path, files: Iterable[Path], root: Path, options: dict[str, Any]
    ) -> Artifact:
        """Measure the artifact at ``path``, whose files lie below ``root``."""
        entries = tuple(FileEntry.of(file, root) for file in files)
        return cls(
            target=target,
            path=path.relative_to(root).as_posix(),
            options=options,
            bytes=sum(entry.bytes for entry in entries),
            files=entries,
        )


class LayerEntry(PaletteEntry):
    """One palette; ``bytes`` counts its packed indices and float16 LUT."""

    bytes: Size


class Contents(Frozen):
    """What the checkpoint holds.

    Attributes:
        fp32_bytes: all weights and buffers before compression.
        palette_bytes: packed indices and float16 LUTs.
    """

    name: str
    factory: str
    task: str | None
    metrics: dict[str, FiniteFloat]
    fp32_bytes: Size
    palette_bytes: Size
    layers: dict[str, LayerEntry]

    @classmethod
    def of(cls, model: PalettizedModel) -> Contents:
        """Describe ``model``."""
        return cls(
            name=model.source.name,
            factory=model.source.factory,
            task=model.source.task.factory if model.source.task else None,
            metrics=dict(model.metrics),
            fp32_bytes=model.fp32_bytes,
            palette_bytes=sum(palette.nbytes for palette in model.palettes.values()),
            layers={
                name: LayerEntry(**PaletteEntry.of(palette).model_dump(), bytes=palette.nbytes)
                for name, palette in model.palettes.items()
            },
        )


class Manifest(Frozen):
    """The whole manifest. It holds no times and no paths of a machine: same input, same bytes."""

    schema_version: Literal[1] = 1
    tool_version: str
    dependencies: dict[str, str]
    contents: Contents
    checkpoint: FileEntry
    samples: FileEntry
    artifacts: tuple[Artifact, ...]

    @model_validator(mode="after")
    def _one_artifact_per_target(self) -> Self:
        targets = [artifact.target for artifact in self.artifacts]
        if len(set(targets)) < len(targets):
            raise ValueError(f"targets repeat: {', '.join(targets)}")
        return self

    def write(self, root: Path) -> None:
        """Write ``root/manifest.json``."""
        (root / MANIFEST).write_text(self.model_dump_json(indent=2) + "\n")


def read_manifest(root: Path) -> Manifest:
    """Read and validate ``root/manifest.json``.

    Raises:
        InvalidInput: when it is missing or malformed, or a path in it leaves the folder.
    """
    file = root / MANIFEST
    return validated(read_json(file, "give the folder of `dkm export`"), Manifest, file)
