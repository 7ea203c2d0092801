"""Export: one checkpoint to every target."""

from dkm_export.exporting.exporter import Capabilities, Exporter

__all__ = ["Capabilities", "Exporter"]
