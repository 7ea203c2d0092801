"""Core ML: an ``.mlpackage`` for iOS 18 and macOS 15 whose weights stay LUTs and indices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dkm_export.exporting import Capabilities, Exporter
from dkm_export.spec import Frozen

if TYPE_CHECKING:
    from torch import nn

    from dkm_export.palette import Palette
    from dkm_export.palettized import PalettizedModel


class CoreMLOptions(Frozen):
    """Settings of the target.

    Attributes:
        precision: of activations, LUTs and dense weights. The Neural Engine computes fp16 only;
            inputs and outputs are float32 (or int32) either way.
    """

    precision: Literal["fp16", "fp32"] = "fp16"


class CoreMLExporter(Exporter[CoreMLOptions]):
    """An ML program with one ``constexpr_lut_to_dense`` per palette; batch norms stay separate."""

    target = "coreml"
    suffix = ".mlpackage"
    packages = ("coremltools",)
    capabilities = Capabilities(bits=(1, 2, 3, 4, 6, 8), padding=False)
    options = CoreMLOptions

    def lower(
        self, model: PalettizedModel, module: nn.Module, folder: Path, options: CoreMLOptions
    ) -> Path:
        """Write ``<name>.mlpackage``.

        Raises:
            Unsupported: when coremltools cannot convert the model, or would not keep a palette.
            InvalidInput: when the model returns another number of outputs than its source names.
        """
        from dkm_exporters.coreml.conversion import convert
        from dkm_exporters.coreml.finishing import finish

        path = folder / f"{model.source.name}{self.suffix}"
        operations = convert(model, module, path, options.precision)
        finish(path, model, operations)
        return path

    def read_palettes(self, artifact: Path) -> dict[str, Palette]:
        """Decode the package's ``constexpr_lut_to_dense`` operations with our own reader.

        Raises:
            InvalidInput: when the package is malformed.
            Unsupported: when another tool wrote a palette that `Palette` cannot express.
        """
        from dkm_exporters.coreml.palettes import read_palettes

        return read_palettes(artifact)
