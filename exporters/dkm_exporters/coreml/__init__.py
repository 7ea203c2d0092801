"""Core ML: an ``.mlpackage`` whose weights stay LUTs and indices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dkm_export.exporting import Description, Exporter, Overhead
from dkm_exporters.coreml.options import FULL
from dkm_exporters.coreml.options import CoreMLOptions as CoreMLOptions

if TYPE_CHECKING:
    from torch import nn

    from dkm_export.palette import Layout, Palette
    from dkm_export.palettized import PalettizedModel

_OPERATION = 1000
"""Bytes: 200 without a batch norm, up to 2000 with one."""


class CoreMLExporter(Exporter[CoreMLOptions]):
    """An ML program with one ``constexpr_lut_to_dense`` per palette; batch norms stay separate."""

    target = "coreml"
    suffix = ".mlpackage"
    packages = ("coremltools",)
    capabilities = FULL
    options = CoreMLOptions

    def requires(self, model: PalettizedModel, options: CoreMLOptions) -> None:
        """Refuse, before any work, what the deployment target or the model cannot have.

        Raises:
            InvalidInput: when an option does not fit the model.
            Unsupported: with the layer, the value and the allowed values.
        """
        options.require_fit(model.source)
        super().requires(model, options)

    def refusal(self, palette: Palette, options: CoreMLOptions) -> str | None:
        """Why the deployment target cannot hold ``palette`` and what to do about it, or None."""
        held = options.capabilities
        if held is None:
            return "iOS15 holds no palettes: set coreml.deployment_target=iOS16 or a later one"
        reason = held.refusal(palette)
        if reason and FULL.refusal(palette) is None:
            return (
                f"{reason} on {options.deployment_target}; change its rule in the recipe, or set "
                "coreml.deployment_target=iOS18, which holds it"
            )
        if options.lut == "int8" and not reason:
            if held is not FULL:
                return (
                    f"{options.deployment_target} has no int8 LUTs: set coreml.lut=float or "
                    "coreml.deployment_target=iOS18"
                )
            if palette.int8_lut is None:
                return (
                    "its LUT is not int8 times a power of two: set coreml.lut=float, or "
                    'lut = "int8" in its rule in the recipe'
                )
        return reason and f"{reason}; change its rule in the recipe"

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
        operations = convert(model, module, path, options)
        finish(path, model, operations, options)
        return path

    def overhead(
        self, name: str, layout: Layout, bits: int | None, options: CoreMLOptions
    ) -> Overhead:
        """The operation, and about half of a batch norm, which a dense weight takes in."""
        if bits is None:
            return Overhead(-2 * layout.size if options.precision == "fp16" else 0)
        return Overhead(_OPERATION)

    def read_palettes(self, artifact: Path) -> dict[str, Palette]:
        """Decode the package's ``constexpr_lut_to_dense`` operations with our own reader.

        Raises:
            InvalidInput: when the package is malformed.
            Unsupported: when another tool wrote a palette that `Palette` cannot express.
        """
        from dkm_exporters.mlprogram.package import Package
        from dkm_exporters.mlprogram.palettes import read_palettes

        return read_palettes(Package(artifact))

    def describe(self, artifact: Path) -> Description:
        """Every constant of every function, those of packages by coremltools alone too.

        Raises:
            InvalidInput: when the package is malformed.
            Unsupported: when it holds something other than an ML program.
        """
        from dkm_exporters.mlprogram.package import Package
        from dkm_exporters.mlprogram.stored import describe

        return Description(self.files(artifact), *describe(Package(artifact)))
