"""Export: one checkpoint to every target, and what is stored in such files."""

from dkm_export.exporting.description import NO_WEIGHT, Description, StoredTensor
from dkm_export.exporting.exporter import Capabilities, Exporter, NoOptions, Overhead

__all__ = [
    "NO_WEIGHT",
    "Capabilities",
    "Description",
    "Exporter",
    "NoOptions",
    "Overhead",
    "StoredTensor",
]
