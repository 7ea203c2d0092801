"""``manifest.json``: what an export folder holds, where it came from, and every file's hash."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, ValidationError

from dkm_export.entry import PaletteEntry
from dkm_export.errors import InvalidInput
from dkm_export.files import files_below, sha256
from dkm_export.spec import Frozen
from dkm_export.validation import explain

FILE_NAME: Final = "manifest.json"


def _stays_inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise ValueError(f"path '{path}' leaves the folder of the manifest")
    return path


RelativePath = Annotated[str, AfterValidator(_stays_inside)]


class FileEntry(Frozen):
    """One file: its path relative to the manifest, its size in bytes and its hash."""

    path: RelativePath
    bytes: int
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
    bytes: int
    files: tuple[FileEntry, ...]

    @classmethod
    def of(cls, target: str, path: Path, root: Path, options: dict[str, Any]) -> Artifact:
        """Measure the artifact at ``path``, which lies below ``root``."""
        files = tuple(FileEntry.of(file, root) for file in files_below(path))
        return cls(
            target=target,
            path=path.relative_to(root).as_posix(),
            options=options,
            bytes=sum(file.bytes for file in files),
            files=files,
        )


class LayerEntry(PaletteEntry):
    """One palette; ``bytes`` counts its packed indices and float16 LUT."""

    bytes: int


class Manifest(Frozen):
    """The whole manifest. It holds no times and no paths of a machine: same input, same bytes."""

    schema_version: Literal[1] = 1
    tool_version: str
    dependencies: dict[str, str]
    name: str
    factory: str
    task: str | None
    metrics: dict[str, float]
    fp32_bytes: int
    palette_bytes: int
    layers: dict[str, LayerEntry]
    checkpoint: FileEntry
    samples: FileEntry
    artifacts: tuple[Artifact, ...]

    def write(self, root: Path) -> None:
        """Write ``root/manifest.json``."""
        (root / FILE_NAME).write_text(self.model_dump_json(indent=2) + "\n")


def read_manifest(root: Path) -> Manifest:
    """Read and validate ``root/manifest.json``.

    Raises:
        InvalidInput: when it is missing or malformed, or a path in it leaves the folder.
    """
    file = root / FILE_NAME
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InvalidInput(f"{file}: {error.strerror}: give the folder of `dkm export`") from error
    except ValidationError as error:
        raise InvalidInput(f"{file}: {explain(error, Manifest)}") from error
