"""The contract of a target, and the palettes that it can hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from dkm_export.errors import Unsupported
from dkm_export.exporting.description import Description, stored_palette
from dkm_export.files import files_below
from dkm_export.palette import MAX_BITS, MAX_DIM
from dkm_export.plugins import missing_packages
from dkm_export.spec import Frozen

if TYPE_CHECKING:
    from torch import nn

    from dkm_export.palette import Layout, Palette
    from dkm_export.palettized import PalettizedModel


@dataclass(frozen=True)
class Capabilities:
    """What palettes a target can hold, all of them by default; `dkm targets` prints it.

    Attributes:
        bits: allowed bits per index.
        max_dim: most weights that share an index.
        axes: allowed axes of the vectors; None for any.
        groups: whether groups of channels may have a LUT each.
        padding: whether ``dim`` may leave a rest on its axis.
    """

    bits: tuple[int, ...] = tuple(range(1, MAX_BITS + 1))
    max_dim: int = MAX_DIM
    axes: tuple[int, ...] | None = None
    groups: bool = True
    padding: bool = True

    def refusal(self, palette: Palette) -> str | None:
        """Why the target cannot hold ``palette`` and what it could hold, or None."""
        layout = palette.layout
        if palette.bits not in self.bits:
            return f"bits {palette.bits} cannot be held, {_allowed(self.bits, palette.bits)}"
        if layout.dim > self.max_dim:
            return f"dim {layout.dim} cannot be held, allowed: 1 to {self.max_dim}"
        if self.axes is not None and layout.dim > 1 and layout.axis not in self.axes:
            return f"axis {layout.axis} cannot be held, {_allowed(self.axes, layout.axis)}"
        if layout.groups > 1 and not self.groups:
            return f"groups {layout.groups} cannot be held, allowed: 1"
        if layout.padding and not self.padding:
            size = layout.shape[layout.axis]
            divisors = [dim for dim in range(1, self.max_dim + 1) if size % dim == 0]
            return (
                f"dim {layout.dim} does not divide axis {layout.axis} of size {size}, "
                f"{_allowed(divisors, layout.dim)}"
            )
        return None


@dataclass(frozen=True)
class Overhead:
    """Bytes for decoding a palette.

    Attributes:
        own: for each palette.
        shared: by name, for whatever palettes of an artifact have in common.
    """

    own: int = 0
    shared: Mapping[str, int] = field(default_factory=dict)


class NoOptions(Frozen):
    """For a target without settings."""


Options = TypeVar("Options", bound=Frozen)


class Exporter(ABC, Generic[Options]):
    """One target. A subclass takes no arguments and imports its packages inside its methods.

    Attributes:
        target: name on the command line, of the extra and of the output folder.
        suffix: of its artifacts, ``.onnx``.
        packages: importable packages that it needs, from the extra of the target's name.
        capabilities: the palettes that it can hold with its default options.
        options: settings of the target, given as ``--set <target>.<key>=<value>``.
    """

    target: ClassVar[str]
    suffix: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    capabilities: ClassVar[Capabilities]
    options: type[Options]

    def unavailable(self) -> str | None:
        """What is not installed and the line that installs it, or None."""
        return missing_packages(self.packages, self.target)

    def requires(self, model: PalettizedModel, options: Options) -> None:
        """Refuse, before any work, what the target cannot hold.

        Raises:
            Unsupported: with the layer, the value and the allowed values.
        """
        for name, palette in model.palettes.items():
            reason = self.refusal(palette, options)
            if reason:
                raise Unsupported(f"{self.target}: {name}: {reason}")

    def refusal(self, palette: Palette, options: Options) -> str | None:
        """Why the target cannot hold ``palette`` and what to do about it, or None."""
        reason = self.capabilities.refusal(palette)
        return reason and f"{reason}; change its rule in the recipe"

    @abstractmethod
    def lower(
        self, model: PalettizedModel, module: nn.Module, folder: Path, options: Options
    ) -> Path:
        """Write the artifact into ``folder`` (which exists and is empty) and return its path.

        Args:
            model: the palettes and the source; the artifact is named ``model.source.name``.
            module: a fresh `PalettizedModel.build`, which the exporter may change.
            folder: where to write.
            options: settings of the target.

        Raises:
            Unsupported: when the target cannot express the model.
        """

    def files(self, artifact: Path) -> list[Path]:
        """The files of an artifact that exists: itself or, for a folder, all below it.

        A target that writes files beside its artifact names them too.
        """
        return files_below(artifact)

    def overhead(self, name: str, layout: Layout, bits: int | None, options: Options) -> Overhead:
        """What such a palette of a parameter takes beside its LUTs and indices, about.

        With None for ``bits``: what a dense weight takes beside its float32 numbers, which is less
        than nothing where they are stored as float16. For plans: only how choices differ counts.
        Where they hardly do, that is nothing.
        """
        return Overhead()

    def notes(self, artifact: Path) -> list[str]:
        """What an app's developers should know of an artifact, a line each, for the report."""
        return []

    @abstractmethod
    def read_palettes(self, artifact: Path) -> dict[str, Palette]:
        """Decode every palette from a file that this target's `lower` wrote.

        Raises:
            InvalidInput: when the file is malformed.
        """

    def describe(self, artifact: Path) -> Description:
        """What is stored in a file of this kind, whoever wrote it; for people who look at it.

        What this target wrote has to be as `read_palettes` wants it. A target that does not say
        more than its palettes leaves the rest of the file unread.

        Raises:
            InvalidInput: when the file is malformed.
            Unsupported: when it is of a kind that is not read.
        """
        palettes, files = self.read_palettes(artifact), self.files(artifact)
        tensors = [stored_palette(name, palette) for name, palette in palettes.items()]
        rest = sum(file.stat().st_size for file in files) - sum(x.nbytes for x in tensors)
        return Description(files, tensors, palettes, {"everything else": max(rest, 0)})


def _allowed(values: Sequence[int], wanted: int) -> str:
    nearest = min(values, key=lambda value: abs(value - wanted))
    return f"allowed: {', '.join(map(str, values))} (nearest: {nearest})"
