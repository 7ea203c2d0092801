"""ML programs, Core ML's format: read and written as data, whatever file they are in."""

from __future__ import annotations

from typing import Final

from dkm_export.exporting import Capabilities

PALETTES: Final = Capabilities(bits=(1, 2, 3, 4, 6, 8), padding=False)
"""What ``constexpr_lut_to_dense`` of iOS 18 holds."""
