"""ExecuTorch on this machine's CPU, through its Python bindings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dkm_export.checking.runtime import Arrays, NumericClass, Runtime, Session
from dkm_export.errors import InvalidInput, Unsupported


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
        import executorch.runtime

        from dkm_exporters.executorch.header import INPUTS_METHOD
        from dkm_exporters.executorch.native import load_backend

        try:
            data = artifact.read_bytes()
        except OSError as error:
            raise InvalidInput(f"{artifact}: cannot be read: {error.strerror}") from error
        try:
            program = executorch.runtime.Runtime.get().load_program(data)
        except RuntimeError as error:
            raise InvalidInput(
                f"{artifact}: not a whole ExecuTorch program: {error}: export it again"
            ) from error
        if not {"forward", INPUTS_METHOD} <= program.method_names:
            raise InvalidInput(
                f"{artifact}: has no methods 'forward' and '{INPUTS_METHOD}', "
                "so `dkm export` did not write it"
            )
        backend = _backend(artifact)
        if backend == "coreml":
            raise Unsupported(
                f"{artifact}: is for the Core ML delegate, which runs on Apple systems only"
            )
        if backend == "xnnpack-lut":
            load_backend()
        try:
            names = program.load_method(INPUTS_METHOD).execute([])
            return _ExecuTorchSession(program, program.load_method("forward"), names)
        except RuntimeError as error:
            raise Unsupported(f"{artifact}: the runtime rejects the program: {error}") from error


def _backend(artifact: Path) -> str:
    """The backend that a program was lowered for.

    Raises:
        InvalidInput: when the file is malformed or not written by this project.
    """
    from dkm_exporters.executorch.program import ProgramFile
    from dkm_exporters.executorch.reading import read_header

    return read_header(ProgramFile(artifact)).backend


class _ExecuTorchSession(Session):
    numeric_class = NumericClass.FP32

    def __init__(self, program: Any, forward: Any, inputs: list[str]) -> None:
        self._program = program  # owns the bytes that the method reads
        self._forward = forward
        self._inputs = inputs

    def run(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        import torch

        tensors = [torch.tensor(inputs[name]) for name in self._inputs]
        try:
            outputs = self._forward.execute(tensors)
        except RuntimeError as error:
            raise InvalidInput(f"executorch: the program fails on these inputs: {error}") from error
        return [np.asarray(output) for output in outputs]
