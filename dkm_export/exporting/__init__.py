"""Export: one checkpoint to every target."""

from dkm_export.exporting.exporter import Capabilities, Exporter, NoOptions

__all__ = ["Capabilities", "Exporter", "NoOptions"]
