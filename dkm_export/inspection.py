"""Look into a checkpoint or an artifact, whoever wrote it."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from dkm_export.checkpoint import SUFFIX, find_checkpoint, load_checkpoint
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.exporting.description import Description, StoredTensor, stored_palette
from dkm_export.exporting.exporter import Exporter
from dkm_export.files import require_inside
from dkm_export.plugins import EXPORTERS, discover
from dkm_export.quiet import quiet
from dkm_export.sizing import Account, DenseSize, account_sizes

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from dkm_export.palette import Palette
    from dkm_export.palettized import PalettizedModel

_LEVEL: Final = 9
"""Of deflate, the most that zip has."""


@dataclass(frozen=True)
class Inspection:
    """What is in a file.

    Attributes:
        file: that was looked at.
        description: its content.
    """

    file: Path
    description: Description

    @property
    def palettes(self) -> Mapping[str, Palette]:
        """By name, those of which LUT and indices are known bit for bit."""
        return self.description.palettes

    @cached_property
    def layers(self) -> list[StoredTensor]:
        """What is compressed, in the order of the file."""
        return [tensor for tensor in self.description.tensors if tensor.bits is not None]

    @cached_property
    def dense(self) -> list[StoredTensor]:
        """What is not, the largest first."""
        dense = [tensor for tensor in self.description.tensors if tensor.bits is None]
        return sorted(dense, key=lambda tensor: -tensor.nbytes)

    @cached_property
    def bytes(self) -> int:
        """Of the file, and of those that belong to it."""
        return sum(file.stat().st_size for file in self.description.files)

    @cached_property
    def totals(self) -> dict[str, int]:
        """Bytes by kind; together all that there are."""
        known = {
            "indices and quantized values": sum(x.value_bytes for x in self.layers),
            "LUTs": sum(x.lut_bytes for x in self.layers),
            "scales": sum(x.scale_bytes for x in self.layers),
            "dense tensors": sum(x.nbytes for x in self.dense),
            "not taken apart": sum(filter(None, self.description.unread.values())),
        }
        return known | {"graph, names, headers": self.bytes - sum(known.values())}

    @cached_property
    def account(self) -> Account | None:
        """Sizes by the DKM paper's convention; None where that does not apply.

        It counts indices, LUTs and dense numbers, so all there is has to be one of these. What has
        the same bytes as something before it counts with that.
        """
        layers = [layer for layer in self.layers if layer.value_bytes]
        palettes = [self.palettes.get(layer.name) for layer in layers]
        if not palettes or None in palettes or self.description.unread:
            return None
        known = [palette for palette in palettes if palette is not None]
        scales = [
            DenseSize(f"{layer.name}.scale", palette.scale.size, layer.scale_bytes, floating=True)
            for layer, palette in zip(layers, known, strict=True)
            if palette.scale is not None
        ]
        dense = [
            DenseSize(x.name, math.prod(x.shape), x.nbytes, floating="float" in x.encoding)
            for x in self.dense
            if x.nbytes
        ]
        return account_sizes([(p.layout, p.bits) for p in known], dense + scales)

    def zipped(self) -> int:
        """Bytes of a zip file of all files, as a download would be; takes a while for large ones.

        Raises:
            OSError: when a file cannot be read.
        """
        sink = _Counter()
        with zipfile.ZipFile(
            sink, "w", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL, strict_timestamps=False
        ) as archive:
            for file in self.description.files:
                name = str(file.relative_to(self.file.parent))
                # a zip file's names are UTF-8, which a file's need not be
                archive.write(file, name.encode("utf-8", "replace").decode())
        return sink.count


def inspect(path: Path, *, verbose: bool = False) -> Inspection:
    """Read a checkpoint, the folder of a run, or an artifact of any tool.

    Raises:
        InvalidInput: when the path is missing, malformed or of no known kind.
        Unsupported: when reading it needs a package that is not installed, or the format has no
            reader.
    """
    exporters: dict[str, Exporter[Any]] = {e.suffix: e for e in discover(EXPORTERS).values()}
    if not path.exists():
        raise InvalidInput(f"{path}: no such file")
    if path.suffix in exporters:
        exporter = exporters[path.suffix]
        reason = exporter.unavailable()
        if reason:
            raise Unsupported(f"{path}: {reason}")
        # before anything is read, and again when it is known which other files belong to it
        require_inside(path, exporter.files(path))
        with quiet(enabled=not verbose):
            found = Inspection(path, exporter.describe(path))
    else:
        path = find_checkpoint(path)
        if not path.name.endswith(SUFFIX):
            known = ", ".join((SUFFIX, *exporters))
            raise InvalidInput(f"{path}: unknown kind of file, known: {known}")
        model = load_checkpoint(path)
        found = Inspection(path, Description([path], list(_stored(model)), model.palettes))
    require_inside(path, found.description.files)
    if min(found.totals.values()) < 0:
        raise InvalidInput(f"{path}: claims to hold more bytes than there are: export it again")
    return found


def _stored(model: PalettizedModel) -> Iterator[StoredTensor]:
    """Without reasons: only the model's code could tell them, and to look at a file runs none."""
    for name, palette in model.palettes.items():
        yield stored_palette(name, palette)
    for name, tensor in model.dense.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(values.data).hexdigest()
        size = tensor.nbytes
        yield StoredTensor(name, tuple(tensor.shape), dtype, value_bytes=size, digest=digest)


class _Counter(io.RawIOBase):
    """A file that only counts what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        size = memoryview(data).nbytes
        self.count += size
        return size
