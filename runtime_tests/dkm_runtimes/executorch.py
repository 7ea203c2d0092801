"""ExecuTorch on this machine's CPU, through its Python bindings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from dkm_export.checking.metrics import Limits
from dkm_export.checking.runtime import Arrays, NumericClass, Runtime, Session
from dkm_export.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from dkm_exporters.executorch.program import ProgramFile


class ExecuTorchRuntime(Runtime):
    """The runtime of the ``executorch`` wheel, with its kernels, XNNPACK and our delegate."""

    name = "executorch"
    target = "executorch"
    where = "native CPU"
    packages: ClassVar[tuple[str, ...]] = ("executorch", "cmake", "ninja")

    def load(self, artifact: Path) -> Session:
        """Load a program; the file is no longer needed afterwards.

        Raises:
            Unsupported: when the runtime rejects the method ``forward``, or our delegate cannot be
                built.
            InvalidInput: when the file is missing, malformed or not written by this project.
        """
        from dkm_exporters.executorch.program import ProgramFile

        return _open(ProgramFile(artifact), artifact.read_bytes())

    def intermediates(
        self, artifact: Path, inputs: Arrays
    ) -> Iterable[tuple[str, npt.NDArray[Any]]]:
        """Run a copy of the program that also returns what it and its XNNPACK delegates compute.

        Raises:
            Unsupported: when the runtime rejects the copy, or it would take too much memory.
            InvalidInput: when the file is malformed.
        """
        from dkm_exporters.executorch.exposing import expose
        from dkm_exporters.executorch.program import ProgramFile

        file = ProgramFile(artifact)
        names = expose(file)
        return zip(names, _open(file, file.to_bytes()).run(inputs), strict=True)

    def device_test(
        self,
        artifact: Path,
        inputs: Arrays,
        outputs: Arrays,
        limits: Mapping[NumericClass, Limits],
    ) -> dict[str, bytes]:
        """A bundled program, ``<name>.bpte``, with these samples."""
        from dkm_runtimes.executorch_device import make_device_test

        return make_device_test(artifact, inputs, outputs, limits)


def _open(file: ProgramFile, content: bytes) -> Session:
    """A session of ``content``, which is the file's or made from it."""
    import executorch.runtime

    from dkm_exporters.executorch.header import INPUTS_METHOD
    from dkm_exporters.executorch.native import load_backend
    from dkm_exporters.executorch.reading import read_header

    artifact, header = file.path, read_header(file)
    if header.backend == "coreml":
        raise Unsupported(
            f"{artifact}: is for the Core ML delegate, which runs on Apple systems only"
        )
    if header.backend == "xnnpack-lut":
        load_backend()
    folder = TemporaryDirectory()
    try:
        program = executorch.runtime.Runtime.get().load_program(
            content, data_path=expand_weights(artifact, Path(folder.name))
        )
    except RuntimeError as error:
        raise InvalidInput(
            f"{artifact}: not a whole ExecuTorch program: {error}: export it again"
        ) from error
    try:
        names = program.load_method(INPUTS_METHOD).execute([])
        if "init" in program.method_names:
            # The methods of a program share their memory here.
            program.load_method("init").execute([])
        forward = program.load_method("forward")
    except RuntimeError as error:
        raise Unsupported(f"{artifact}: the runtime rejects the program: {error}") from error
    numeric_class = NumericClass(header.precision)
    return _ExecuTorchSession(numeric_class, program, forward, names, folder)


def expand_weights(artifact: Path, folder: Path) -> Path | None:
    """Do what an app does when it is installed; None where all weights are in the program.

    Raises:
        InvalidInput: when the file with the packed weights is malformed.
    """
    from dkm_exporters.executorch.options import WEIGHTS_SUFFIX
    from dkm_exporters.executorch.weights_file import WeightsFile

    packed = artifact.with_suffix(WEIGHTS_SUFFIX)
    if not packed.is_file():
        return None
    weights = folder / "weights.ptd"
    WeightsFile.read(packed).expand(weights)
    return weights


class _ExecuTorchSession(Session):
    def __init__(
        self,
        numeric_class: NumericClass,
        program: Any,
        forward: Any,
        inputs: list[str],
        folder: TemporaryDirectory[str],
    ) -> None:
        self.numeric_class = numeric_class
        self._program = program  # owns the bytes that the method reads
        self._forward = forward
        self._inputs = inputs
        self._folder = folder  # has what the program reads besides

    def run(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        import torch

        tensors = [torch.tensor(inputs[name]) for name in self._inputs]
        try:
            outputs = self._forward.execute(tensors)
        except RuntimeError as error:
            raise InvalidInput(f"executorch: the program fails on these inputs: {error}") from error
        return [np.asarray(output) for output in outputs]
