"""ExecuTorch in C++, as an app has it: our runner, built against the ``executorch`` package."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dkm_export.checking.runtime import Arrays, NumericClass, Runtime, Session
from dkm_export.errors import InvalidInput, Unsupported
from dkm_runtimes.child import Child
from dkm_runtimes.executorch import expand_weights


class ExecuTorchRunnerRuntime(Runtime):
    """A program that loads artifacts with ExecuTorch's ``Module``; it is built when needed."""

    name = "executorch-runner"
    target = "executorch"
    where = "native CPU, our C++ runner"
    packages: ClassVar[tuple[str, ...]] = ("executorch", "cmake", "ninja")

    def unavailable(self) -> str | None:
        """Why this runtime cannot run here, or None."""
        reason = super().unavailable()
        if reason is None:
            from dkm_exporters.executorch.native import unavailable

            reason = unavailable()
        return reason

    def load(self, artifact: Path) -> Session:
        """Load a program in a process of its own.

        Raises:
            Unsupported: when the runner cannot be built, or rejects the program.
            InvalidInput: when the file is missing, malformed or not written by this project.
        """
        from dkm_exporters.executorch.native import RUNNER, built

        return RunnerSession([str(built() / RUNNER)], artifact)


class RunnerSession(Session):
    """A program in a process of the runner.

    Args:
        runner: the command that starts it; its arguments are added.
        artifact: the program.

    Raises:
        Unsupported: when the runner rejects the program.
        InvalidInput: when the file is missing, malformed or not written by this project.
    """

    numeric_class = NumericClass.FP32

    def __init__(self, runner: Sequence[str], artifact: Path) -> None:
        from dkm_exporters.executorch.header import INPUTS_METHOD
        from dkm_exporters.executorch.program import ProgramFile

        self._inputs = ProgramFile(artifact).strings(INPUTS_METHOD)
        self._folder = tempfile.TemporaryDirectory()
        weights = expand_weights(artifact, Path(self._folder.name))
        data = [] if weights is None else ["--data", str(weights)]
        command = [*runner, str(artifact.resolve()), *data]
        self._child = Child("executorch: the runner", command)
        try:
            self._receive()
        except InvalidInput as error:
            raise Unsupported(f"{artifact}: the runner rejects the program: {error}") from error

    def run(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        """Run once.

        Returns:
            The outputs in the model's order.

        Raises:
            InvalidInput: when the runner refuses the inputs, or the process crashes.
        """
        given, made = (Path(self._folder.name, name) for name in ("in", "out"))
        for folder in (given, made):
            folder.mkdir(exist_ok=True)
        for number, name in enumerate(self._inputs):
            np.save(given / f"{number}.npy", inputs[name])
        self._child.write(f"{given}\t{made}\n".encode())
        reply = self._receive()
        return [np.load(made / f"{number}.npy") for number in range(reply["outputs"])]

    def _receive(self) -> dict[str, Any]:
        with self._child.awaited():
            reply: dict[str, Any] = json.loads(self._child.read_line())
        if "error" in reply:
            raise InvalidInput(f"executorch: the runner fails: {reply['error']}")
        return reply
