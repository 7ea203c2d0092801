"""ExecuTorch: programs whose weights stay packed, for several backends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dkm_export.errors import Unsupported
from dkm_export.exporting import Capabilities, Description, Exporter
from dkm_export.plugins import missing_packages
from dkm_exporters.executorch.options import LINKS, WEIGHTS_SUFFIX
from dkm_exporters.executorch.options import ExecuTorchOptions as ExecuTorchOptions
from dkm_exporters.mlprogram import PALETTES

if TYPE_CHECKING:
    from torch import nn

    from dkm_export.palette import Palette
    from dkm_export.palettized import PalettizedModel


class ExecuTorchExporter(Exporter[ExecuTorchOptions]):
    """A ``.pte`` file with float16 LUTs and packed indices; `Backend` says who decodes them."""

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
        # weights of convolutions alone have more axes
        if options.backend == "xnnpack-init" and len(palette.layout.shape) != 2:
            reason = "is a convolution's, and XNNPACK takes decoded weights for linear layers only"
        return reason and (
            f"backend={options.backend}: {reason}; set executorch.backend to xnnpack-lut, "
            "xnnpack-ptd or portable, which hold it, or change its rule in the recipe"
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

        for suffix, content in lower(module, model, options).items():
            (folder / f"{model.source.name}{suffix}").write_bytes(content)
        return folder / f"{model.source.name}{self.suffix}"

    def files(self, artifact: Path) -> list[Path]:
        """The program, and its packed weights when they are a file of their own."""
        beside = artifact.with_suffix(WEIGHTS_SUFFIX)
        return [artifact, beside] if beside.is_file() else [artifact]

    def notes(self, artifact: Path) -> list[str]:
        """What the artifact computes in, and what the app has to link and to call."""
        from dkm_exporters.executorch.program import ProgramFile
        from dkm_exporters.executorch.reading import read_header

        header = read_header(ProgramFile(artifact))
        return [f"{header.backend}, {header.precision}: {LINKS[header.backend]}"]

    def read_palettes(self, artifact: Path) -> dict[str, Palette]:
        """Decode every palette, without its scale, as the program's own instructions decode it.

        Raises:
            InvalidInput: when the file is missing, truncated, malformed or contradicts itself.
        """
        from dkm_exporters.executorch.reading import read

        return read(artifact)

    def describe(self, artifact: Path) -> Description:
        """Every constant of a program and of its delegates for XNNPACK and Core ML.

        Raises:
            InvalidInput: when the file is missing, truncated, malformed or contradicts itself.
            Unsupported: when it has constants of a type that is not known.
        """
        from dkm_exporters.executorch.program import ProgramFile
        from dkm_exporters.executorch.stored import describe

        return describe(ProgramFile(artifact), self.files(artifact))
