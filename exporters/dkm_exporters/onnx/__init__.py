"""ONNX: palettes decoded in the graph by standard operators, opset 18, for ONNX Runtime 1.16 on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dkm_export.exporting import Capabilities, Description, Exporter, Overhead
from dkm_exporters.onnx.options import OnnxOptions as OnnxOptions
from dkm_exporters.onnx.options import data_file

if TYPE_CHECKING:
    from torch import nn

    from dkm_export.palette import Layout, Palette
    from dkm_export.palettized import PalettizedModel
    from dkm_exporters.onnx.contents import Contents


class OnnxExporter(Exporter[OnnxOptions]):
    """One ``.onnx`` file: float16 LUTs and packed indices, decoded to float32 in the graph."""

    target = "onnx"
    suffix = ".onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnx_ir", "onnxscript")
    capabilities = Capabilities()
    options = OnnxOptions

    def requires(self, model: PalettizedModel, options: OnnxOptions) -> None:
        """Refuse, before any work, axes that the model does not have.

        Raises:
            InvalidInput: with the input, the axis and what is allowed.
            Unsupported: with the layer, the value and the allowed values.
        """
        options.require_fit(model.source, self.target)
        super().requires(model, options)

    def lower(
        self, model: PalettizedModel, module: nn.Module, folder: Path, options: OnnxOptions
    ) -> Path:
        """Write ``<name>.onnx``; batch norms are folded into the palettes' scales first.

        Raises:
            Unsupported: for an operator that ONNX cannot express, or a palette that the model does
                not use.
            InvalidInput: when the model returns another number of outputs than its source names.
        """
        from dkm_export.folding import fold_batch_norm
        from dkm_export.layers import dense_reasons
        from dkm_exporters.onnx.artifact import write_artifact
        from dkm_exporters.onnx.decoding import insert_decoders
        from dkm_exporters.onnx.precision import store_as_float16
        from dkm_exporters.onnx.tracing import example_inputs, trace

        inputs = example_inputs(model.source, options)
        dense = dense_reasons(module, model.spec)
        palettes = fold_batch_norm(module, model.palettes, inputs, model.ties)
        graph = trace(module, inputs, model.source, options)
        turned = insert_decoders(graph, palettes, model.ties, functions=options.functions)
        if options.side_data == "fp16":
            store_as_float16(graph.graph, module, palettes, model.source, inputs)
        path = folder / f"{model.source.name}{self.suffix}"
        write_artifact(graph, palettes, path, options, dense, turned)
        return path

    def files(self, artifact: Path) -> list[Path]:
        """The file, and the tensors beside it when it is too large for one file."""
        beside = data_file(artifact)
        return [artifact, beside] if beside.is_file() else [artifact]

    def read_palettes(self, artifact: Path) -> dict[str, Palette]:
        """Decode every palette, with the ``scale`` that a folded batch norm left.

        Raises:
            InvalidInput: when the file is missing, truncated, malformed or contradicts itself.
        """
        from dkm_exporters.onnx.artifact import Artifact

        return Artifact.of(self._read(artifact)).palettes()

    def describe(self, artifact: Path) -> Description:
        """Every initializer, of files by torch, ONNX Runtime's quantizers and others too.

        Raises:
            InvalidInput: when the file is missing, truncated or malformed.
        """
        from dkm_exporters.onnx.description import describe

        return describe(self._read(artifact), self.files(artifact))

    def _read(self, artifact: Path) -> Contents:
        from dkm_exporters.onnx.contents import read_contents

        return read_contents(artifact)

    def overhead(
        self, name: str, layout: Layout, bits: int | None, options: OnnxOptions
    ) -> Overhead:
        """Operators that decode such a palette, and what decoders share."""
        from dkm_exporters.onnx.overhead import decoder_overhead

        if bits is None:
            return Overhead(-2 * layout.size if options.side_data == "fp16" else 0)
        return decoder_overhead(name, layout, bits, functions=options.functions)

    def notes(self, artifact: Path) -> list[str]:
        """How much of the model the phones' execution providers could take, and what to avoid."""
        from dkm_exporters.onnx.artifact import KEEP
        from dkm_exporters.onnx.mobile import usability

        return [usability(artifact), KEEP]
