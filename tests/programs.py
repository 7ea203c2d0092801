"""What the tests of ExecuTorch's backends do with a program."""

from __future__ import annotations

from pathlib import Path

from dkm_export.palettized import PalettizedModel
from dkm_exporters.executorch import ExecuTorchExporter


def differing(model: PalettizedModel, artifact: Path) -> list[str]:
    """Names of the palettes that the artifact holds otherwise than the model."""
    found = ExecuTorchExporter().read_palettes(artifact)
    assert found.keys() == model.palettes.keys()
    return [name for name, p in model.palettes.items() if p.difference(found[name])]
