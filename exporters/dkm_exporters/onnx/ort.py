"""ONNX Runtime's own format, for its reduced mobile builds, with weights that stay packed."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dkm_export.exporting import Overhead
from dkm_exporters.onnx import OnnxExporter, OnnxOptions

if TYPE_CHECKING:
    from torch import nn

    from dkm_export.exporting import Description
    from dkm_export.palette import Layout
    from dkm_export.palettized import PalettizedModel
    from dkm_exporters.onnx.contents import Contents

_TIMES = 3
"""How many bytes decoders take for each byte in an ``.onnx`` file: 2.7 to 3.4."""


class OrtExporter(OnnxExporter):
    """One ``.ort`` file, made from the ``.onnx`` file; beside it, the operators that it needs."""

    target = "ort"
    suffix = ".ort"
    packages = (*OnnxExporter.packages, "onnxruntime", "flatbuffers")

    def lower(
        self, model: PalettizedModel, module: nn.Module, folder: Path, options: OnnxOptions
    ) -> Path:
        """Write ``<name>.ort`` and ``<name>.required_operators_and_types.config``.

        Raises:
            Unsupported: what `OnnxExporter.lower` raises.
            InvalidInput: likewise.
        """
        from dkm_exporters.onnx.ort_format import convert, write_required_operators

        path = folder / f"{model.source.name}{self.suffix}"
        with TemporaryDirectory() as temporary:
            convert(OnnxExporter().lower(model, module, Path(temporary), options), path)
        write_required_operators(path, _required_operators(path))
        return path

    def files(self, artifact: Path) -> list[Path]:
        """The artifact and, where it is there, the list of operators, which no app has to ship."""
        beside = _required_operators(artifact)
        return [artifact, beside] if beside.is_file() else [artifact]

    def describe(self, artifact: Path) -> Description:
        """As `OnnxExporter.describe`, of the ``.ort`` file alone.

        Raises:
            InvalidInput: when the file is missing, truncated or malformed.
        """
        from dkm_exporters.onnx.description import describe

        return describe(self._read(artifact), [artifact])

    def overhead(
        self, name: str, layout: Layout, bits: int | None, options: OnnxOptions
    ) -> Overhead:
        """As in an ``.onnx`` file, without functions, times what the format takes more."""
        inline = options.model_copy(update={"functions": False})
        found = super().overhead(name, layout, bits, inline)
        if bits is None:
            return found
        shared = {key: _TIMES * count for key, count in found.shared.items()}
        return Overhead(_TIMES * found.own, shared)

    def notes(self, artifact: Path) -> list[str]:
        """None: reduced builds have no execution providers, and no simplifier reads the format."""
        return []

    def _read(self, artifact: Path) -> Contents:
        from dkm_exporters.onnx.ort_format import read_contents

        return read_contents(artifact)


def _required_operators(artifact: Path) -> Path:
    """The name that ONNX Runtime's own converter gives."""
    return artifact.with_suffix(".required_operators_and_types.config")
