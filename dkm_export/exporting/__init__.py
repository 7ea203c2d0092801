"""Export: one checkpoint to every target."""

from dkm_export.exporting.exporter import Capabilities, DenseTensor, Exporter, NoOptions

__all__ = ["Capabilities", "DenseTensor", "Exporter", "NoOptions"]
