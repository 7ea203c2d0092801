"""Export: one checkpoint to every target."""

from dkm_export.exporting.exporter import (
    NO_WEIGHT,
    Capabilities,
    DenseTensor,
    Exporter,
    NoOptions,
    Overhead,
)

__all__ = ["NO_WEIGHT", "Capabilities", "DenseTensor", "Exporter", "NoOptions", "Overhead"]
