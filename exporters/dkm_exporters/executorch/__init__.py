"""ExecuTorch: palettes decoded in the graph by portable operators that every runtime has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dkm_export.exporting import Capabilities, Exporter
from dkm_exporters.executorch.options import LINKS, WEIGHTS_SUFFIX
from dkm_exporters.executorch.options import ExecuTorchOptions as ExecuTorchOptions

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

    def lower(
        self, model: PalettizedModel, module: nn.Module, folder: Path, options: ExecuTorchOptions
    ) -> Path:
        """Write ``<name>.pte``; batch norms are folded into the palettes' scales first.

        Raises:
            Unsupported: when torch.export or ExecuTorch cannot express the model, no stock kernel
                runs an operator, or the model does not use a palette.
            InvalidInput: when the model returns another number of outputs than its source names.
        """
        from dkm_exporters.executorch.lowering import lower

        for suffix, content in lower(module, model, options).items():
            (folder / f"{model.source.name}{suffix}").write_bytes(content)
        return folder / f"{model.source.name}{self.suffix}"

    def files(self, artifact: Path) -> list[Path]:
        """The program, and its packed weights when they are a file of their own."""
        beside = artifact.with_suffix(WEIGHTS_SUFFIX)
        return [artifact, beside] if beside.is_file() else [artifact]

    def notes(self, artifact: Path) -> list[str]:
        """What the app has to link and to call for the artifact's backend."""
        from dkm_exporters.executorch.program import ProgramFile
        from dkm_exporters.executorch.reading import read_header

        backend = read_header(ProgramFile(artifact)).backend
        return [f"{backend}: {LINKS[backend]}"]

    def refusal(self, palette: Palette, options: ExecuTorchOptions) -> str | None:
        """Why the backend cannot hold ``palette``, or None; convolutions alone have other ranks."""
        if options.backend == "xnnpack-init" and len(palette.layout.shape) != 2:
            return (
                "is a convolution's, and XNNPACK takes a decoded weight for linear layers only; "
                "set executorch.backend=xnnpack-lut, xnnpack-ptd or portable"
            )
        return super().refusal(palette, options)

    def read_palettes(self, artifact: Path) -> dict[str, Palette]:
        """Decode every palette, without its scale, as the program's own instructions decode it.

        Raises:
            InvalidInput: when the file is missing, truncated, malformed or contradicts itself.
        """
        from dkm_exporters.executorch.reading import read

        return read(artifact)
