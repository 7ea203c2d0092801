"""What the tests of ExecuTorch's backends do with a program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from dkm_export.palette import Palette
from dkm_export.palettized import PalettizedModel
from dkm_exporters.executorch import ExecuTorchExporter


def differing(model: PalettizedModel, artifact: Path) -> list[str]:
    """Names of the palettes that the artifact holds otherwise than the model."""
    found = ExecuTorchExporter().read_palettes(artifact)
    assert found.keys() == model.palettes.keys()
    return [name for name, p in model.palettes.items() if p.difference(found[name])]


@contextmanager
def changed_bit(file: Path, palette: Palette, part: Literal["lut", "indices"]) -> Iterator[None]:
    """Change one bit of a palette in the file, where its bytes are once."""
    data = file.read_bytes()
    content = (palette.lut if part == "lut" else palette.packed).tobytes()
    assert data.count(content) == 1
    changed = bytearray(data)
    changed[data.index(content) + len(content) // 2] ^= 1
    file.write_bytes(changed)
    yield
    file.write_bytes(data)
