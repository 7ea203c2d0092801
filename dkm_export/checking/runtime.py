"""The contract of a runtime: something that executes artifacts of one target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy.typing as npt

from dkm_export.checking.installation import Installation
from dkm_export.errors import Unsupported
from dkm_export.plugins import missing_packages

if TYPE_CHECKING:
    from dkm_export.checking.metrics import Limits

Arrays = Mapping[str, npt.NDArray[Any]]


class NumericClass(StrEnum):
    """How precisely a runtime computes an artifact, which decides the limits it is held to."""

    FP32 = "fp32"
    FP16_STORED = "fp32-fp16-stored"
    FP16 = "fp16"


class Session(ABC):
    """A loaded artifact.

    Attributes:
        numeric_class: precision of this artifact on this runtime.
    """

    numeric_class: NumericClass

    @abstractmethod
    def run(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        """Run once: inputs by name, with the shapes and dtypes of the model's source.

        Returns:
            The outputs in the model's order.
        """


class Runtime(ABC):
    """Executes artifacts. A subclass imports its packages in its methods.

    One that an entry point names takes no arguments; a `Bridge` makes others of devices.

    Attributes:
        name: name on the command line and in reports.
        target: the target whose artifacts it runs.
        where: how it runs, in words that claim no more than is true: ``native CPU``,
            ``interpreted with torch on CPU``.
        packages: importable packages that it needs, from the target's extra.
        only_named: why a check runs it only when it is named, or None for one that always runs.
        test_seconds: how long it may compute on the task's test split; the inputs that are left
            then are left out, and the report says so. None for no end.
    """

    name: str
    target: ClassVar[str]
    where: str
    packages: ClassVar[tuple[str, ...]]
    only_named: ClassVar[str | None] = None
    test_seconds: ClassVar[float | None] = None

    def unavailable(self) -> str | None:
        """Why this runtime cannot run here, or None."""
        return missing_packages(self.packages, self.target)

    def reported_version(self) -> str | None:
        """What computes, with its version, for reports: ``onnxruntime 1.30.0``; None if unknown.

        It is asked of a runtime that can run here. The first of `packages` is what computes.
        """
        for package in self.packages[:1]:
            with suppress(metadata.PackageNotFoundError):
                return f"{package} {metadata.version(package)}"
        return None

    @abstractmethod
    def load(self, artifact: Path) -> Session:
        """Load an artifact.

        Raises:
            Unsupported: when the runtime cannot execute it, with the operator or feature.
            InvalidInput: when the file is malformed.
        """

    def intermediates(
        self, artifact: Path, inputs: Arrays
    ) -> Iterable[tuple[str, npt.NDArray[Any]]]:
        """Run once and show the tensors on the way to the outputs, and the outputs.

        Where a check finds wrong outputs, it looks here for the layer that they come from.

        Args:
            artifact: that `load` takes.
            inputs: as for `Session.run`.

        Returns:
            Names in the artifact, and arrays, in any layout and order. What does not depend on the
            inputs, such as decoded weights, need not be there.

        Raises:
            Unsupported: when the runtime cannot show them, with the reason.
            InvalidInput: when the file is malformed.
        """
        raise Unsupported(f"{self.name} shows outputs only")

    def device_test(
        self,
        artifact: Path,
        inputs: Arrays,
        outputs: Arrays,
        limits: Mapping[NumericClass, Limits],
    ) -> dict[str, bytes]:
        """A test for an app's own tests, which does on the device what `dkm check` does here.

        It runs where this runtime may not: nothing is asked of `unavailable`.

        Args:
            artifact: the file or folder that the app holds.
            inputs: samples by name of the input, ``[samples, *shape]`` as the model's source says.
            outputs: what PyTorch computes for them by name of the output, ``[samples, *shape]``.
            limits: by numeric class; the test takes those of the artifact's.

        Returns:
            Contents by name of the file; none for a runtime that writes no test.

        Raises:
            Unsupported: when the device could not be given these samples.
            InvalidInput: when the artifact is malformed.
        """
        return {}


class InstallableRuntime(Runtime):
    """A runtime whose files `dkm runtimes install` downloads; nothing else does.

    Attributes:
        version: of what is downloaded, pinned by the subclass.
    """

    packages: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[str]

    @property
    def installation(self) -> Installation:
        """Where the files are, or would be."""
        return Installation(self.name, self.version)

    def unavailable(self) -> str | None:
        """Why this runtime cannot run here, or None."""
        problem = self.installation.problem()
        return f"{problem}: dkm runtimes install {self.name}" if problem else super().unavailable()

    def reported_version(self) -> str | None:
        """What was downloaded."""
        return f"{self.name} {self.version}"

    def install(self, progress: Callable[[str], None]) -> None:
        """Download the files, unless they are there and whole.

        Args:
            progress: called with a line before each step that takes a while.

        Raises:
            Unsupported: when they cannot be had, with the reason; then nothing has changed.
        """
        if self.installation.problem():
            with self.installation.staged() as folder:
                self.download(folder, progress)

    @abstractmethod
    def download(self, folder: Path, progress: Callable[[str], None]) -> None:
        """Fill an empty folder with the files, verified.

        Raises:
            Unsupported: when they cannot be had, with the reason.
        """
