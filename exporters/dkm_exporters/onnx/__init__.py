"""ONNX: palettes decoded in the graph by standard operators, opset 18, for ONNX Runtime 1.16 on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dkm_export.exporting import Capabilities, Exporter
from dkm_exporters.onnx.options import OnnxOptions as OnnxOptions

if TYPE_CHECKING:
    from torch import nn

    from dkm_export.palette import Palette
    from dkm_export.palettized import PalettizedModel


class OnnxExporter(Exporter[OnnxOptions]):
    """One ``.onnx`` file: float16 LUTs and packed indices, decoded to float32 in the graph."""

    target = "onnx"
    suffix = ".onnx"
    packages = ("onnx", "onnx_ir", "onnxscript")
    capabilities = Capabilities()
    options = OnnxOptions

    def lower(
        self, model: PalettizedModel, module: nn.Module, folder: Path, options: OnnxOptions
    ) -> Path:
        """Write ``<name>.onnx``; batch norms are folded into the palettes' scales first.

        Raises:
            Unsupported: for an operator that ONNX cannot express, a palette that the model does
                not use, or a file of more than 2 GB.
            InvalidInput: when the model returns another number of outputs than its source names.
        """
        from dkm_export.folding import fold_batch_norm
        from dkm_exporters.onnx.artifact import write_artifact
        from dkm_exporters.onnx.decoding import insert_decoders
        from dkm_exporters.onnx.tracing import trace

        inputs = model.source.example_inputs()
        palettes = fold_batch_norm(module, model.palettes, inputs, model.ties)
        graph = trace(module, inputs, model.source)
        insert_decoders(graph, palettes, model.ties)
        path = folder / f"{model.source.name}{self.suffix}"
        write_artifact(graph, palettes, path)
        return path

    def read_palettes(self, artifact: Path) -> dict[str, Palette]:
        """Decode every palette, with the ``scale`` that a folded batch norm left.

        Raises:
            InvalidInput: when the file is missing, truncated, malformed or contradicts itself.
        """
        from dkm_exporters.onnx.artifact import read_artifact

        return read_artifact(artifact)

    def notes(self, artifact: Path) -> list[str]:
        """How much of the model the phones' execution providers could take, and what to avoid."""
        from dkm_exporters.onnx.mobile import KEEP, usability

        return [usability(artifact), KEEP]
