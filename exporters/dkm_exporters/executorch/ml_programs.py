"""The ML programs of a ``.pte`` file: the palettes in what its Core ML delegates are given."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from dkm_export.errors import InvalidInput
from dkm_export.exporting import StoredTensor
from dkm_export.palette import Palette
from dkm_exporters.executorch.folders import unpack_folder
from dkm_exporters.mlprogram.constants import LUT_TO_DENSE
from dkm_exporters.mlprogram.package import Package
from dkm_exporters.mlprogram.palettes import read_palettes
from dkm_exporters.mlprogram.stored import Unread, describe

PACKAGE: Final = "model.mlpackage"
METADATA: Final = "metadata.json"
"""What the delegate's folder has: the names of inputs and outputs, and of the cache's entry."""


def read_part(processed: bytes, label: str) -> dict[str, Palette]:
    """The palettes of a delegate, by parameter name, in the order of its operations.

    Args:
        processed: what the delegate is given.
        label: what errors call it.

    Raises:
        InvalidInput: when it is malformed, or does not use a palette as it is.
        Unsupported: when a palette has no `Palette` equivalent.
    """
    try:
        files = unpack_folder(processed)
    except InvalidInput as error:
        raise InvalidInput(f"{label}: {error}: export it again") from error
    for path in files:
        # The delegate would prefer a compiled model.
        if path.partition("/")[0] not in (PACKAGE, METADATA):
            raise InvalidInput(f"{label}: has an unknown file '{path}': export it again")
    with _package(files, label) as package:
        used = {name for operation in package.operations for name in operation.references}
        palettes = read_palettes(package)
        for operation in package.operations:
            if operation.kind == LUT_TO_DENSE and operation.name not in used:
                raise package.invalid(f"nothing uses the palette '{operation.name}'")
        for name, palette in palettes.items():
            if palette.scale is not None:
                raise package.invalid(f"{name}: something scales its weights")
    return palettes


def describe_part(
    processed: bytes, label: str
) -> tuple[list[StoredTensor], dict[str, Palette], Unread]:
    """What is stored in a delegate, whoever made it, as `stored.describe` says it.

    Raises:
        InvalidInput: when it is malformed, or has no ML program that is not compiled.
        Unsupported: when it holds something other than an ML program.
    """
    files = unpack_folder(processed)
    if not any(path.startswith(f"{PACKAGE}/") for path in files):
        raise InvalidInput(f"{label}: has no '{PACKAGE}'")
    with _package(files, label) as package:
        return describe(package)


@contextmanager
def _package(files: Mapping[str, bytes], label: str) -> Iterator[Package]:
    with tempfile.TemporaryDirectory() as folder:
        write_files(files, Path(folder))
        yield Package(Path(folder, PACKAGE), label)


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files by path, which `unpack_folder` has checked."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
