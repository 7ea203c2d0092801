"""ExecuTorch in C++, as an app has it: our runner, built against the ``executorch`` package."""

from __future__ import annotations

import json
import tempfile
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
        from dkm_exporters.executorch.header import INPUTS_METHOD
        from dkm_exporters.executorch.native import RUNNER, built
        from dkm_exporters.executorch.program import ProgramFile
        from dkm_exporters.executorch.reading import read_header

        file = ProgramFile(artifact)
        numeric_class = NumericClass(read_header(file).precision)
        names = file.strings(INPUTS_METHOD)
        return _RunnerSession(built() / RUNNER, artifact, names, numeric_class)


class _RunnerSession(Session):
    def __init__(
        self, runner: Path, artifact: Path, inputs: list[str], numeric_class: NumericClass
    ) -> None:
        self.numeric_class = numeric_class
        self._inputs = inputs
        self._folder = tempfile.TemporaryDirectory()
        weights = expand_weights(artifact, Path(self._folder.name))
        data = [] if weights is None else ["--data", str(weights)]
        command = [str(runner), str(artifact.resolve()), *data]
        self._child = Child(f"executorch: {runner.name}", command)
        try:
            self._receive()
        except InvalidInput as error:
            raise Unsupported(f"{artifact}: the runner rejects the program: {error}") from error

    def run(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
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
