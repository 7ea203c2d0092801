"""ExecuTorch: palettes decoded in the graph by portable operators that every runtime has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dkm_export.errors import Unsupported
from dkm_export.exporting import Capabilities, Exporter
from dkm_export.plugins import missing_packages
from dkm_exporters.executorch.options import ExecuTorchOptions as ExecuTorchOptions
from dkm_exporters.mlprogram import PALETTES

if TYPE_CHECKING:
    from torch import nn

    from dkm_export.palette import Palette
    from dkm_export.palettized import PalettizedModel


class ExecuTorchExporter(Exporter[ExecuTorchOptions]):
    """One ``.pte`` file: float16 LUTs and packed indices, decoded to float32 before each use."""

    target = "executorch"
    suffix = ".pte"
    packages = ("executorch",)
    capabilities = Capabilities()
    options = ExecuTorchOptions

    def requires(self, model: PalettizedModel, options: ExecuTorchOptions) -> None:
        """Refuse, before any work, what the backend cannot hold, or what it needs to be made.

        Raises:
            Unsupported: with the layer, the value and the allowed values.
        """
        missing = missing_packages(("coremltools",), "coreml")
        if options.backend == "coreml" and missing:
            raise Unsupported(f"executorch: backend=coreml: {missing}")
        super().requires(model, options)

    def refusal(self, palette: Palette, options: ExecuTorchOptions) -> str | None:
        """Why the backend cannot hold ``palette`` and what to do about it, or None."""
        reason = PALETTES.refusal(palette) if options.backend == "coreml" else None
        return reason and (
            f"backend=coreml: {reason}; change its rule in the recipe, or set "
            "executorch.backend=xnnpack-lut or portable, which hold it"
        )

    def lower(
        self, model: PalettizedModel, module: nn.Module, folder: Path, options: ExecuTorchOptions
    ) -> Path:
        """Write ``<name>.pte``; but for Core ML, batch norms become scales of the palettes first.

        Raises:
            Unsupported: when torch.export or ExecuTorch cannot express the model, no stock kernel
                runs an operator, or the model does not use a palette.
            InvalidInput: when the model returns another number of outputs than its source names.
        """
        from dkm_exporters.executorch.lowering import lower

        path = folder / f"{model.source.name}{self.suffix}"
        path.write_bytes(lower(module, model, options))
        return path

    def read_palettes(self, artifact: Path) -> dict[str, Palette]:
        """Decode every palette, without its scale, as the program's own instructions decode it.

        Raises:
            InvalidInput: when the file is missing, truncated, malformed or contradicts itself.
        """
        from dkm_exporters.executorch.reading import read

        return read(artifact)
