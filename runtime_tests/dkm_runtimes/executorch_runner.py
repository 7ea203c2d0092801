"""ExecuTorch in C++, as an app has it: our runner, built against the ``executorch`` package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, ValidationError

from dkm_export.checking.runtime import Arrays, NumericClass, Runtime, Session
from dkm_export.errors import InvalidInput, Unsupported
from dkm_runtimes.child import Child, TooSlow
from dkm_runtimes.executorch import expand_weights

_MOST_OUTPUTS: Final = 10_000


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

        return local_session(artifact, [str(built() / RUNNER)])


def local_session(artifact: Path, runner: Sequence[str]) -> RunnerSession:
    """Load a program here.

    Args:
        artifact: the program.
        runner: the command that starts the runner; its arguments are added.

    Raises:
        Unsupported: when the runner rejects the program.
        InvalidInput: when the program is malformed or not written by this project.
    """
    folder = TemporaryDirectory()
    weights = expand_weights(artifact, Path(folder.name))
    data = [] if weights is None else ["--data", str(weights)]
    return RunnerSession(artifact, [*runner, str(artifact.resolve()), *data], folder)


class RunnerSession(Session):
    """A process of the runner, which reads and writes arrays as files in a folder.

    Args:
        artifact: the program.
        command: starts the runner with it.
        folder: for the arrays; it is deleted with the session.

    Raises:
        Unsupported: when the runner rejects the program.
        InvalidInput: when the program is malformed or not written by this project.
    """

    def __init__(
        self, artifact: Path, command: Sequence[str], folder: TemporaryDirectory[str]
    ) -> None:
        from dkm_exporters.executorch.header import INPUTS_METHOD
        from dkm_exporters.executorch.program import ProgramFile
        from dkm_exporters.executorch.reading import read_header

        file = ProgramFile(artifact)
        self.numeric_class = NumericClass(read_header(file).precision)
        self._inputs = file.strings(INPUTS_METHOD)
        self._folder = folder
        self._given, self._made = (Path(folder.name, name) for name in ("in", "out"))
        for part in (self._given, self._made):
            part.mkdir()
        self._child = Child("executorch: the runner", command)
        try:
            self._receive()
        except TooSlow:
            raise
        except InvalidInput as error:
            raise Unsupported(f"{artifact}: the runner rejects the program: {error}") from error

    def run(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        files = [self._given / f"{number}.npy" for number in range(len(self._inputs))]
        for file, name in zip(files, self._inputs, strict=True):
            np.save(file, inputs[name])
        return [np.load(file) for file in self._execute(files)]

    def _execute(self, files: Sequence[Path]) -> list[Path]:
        """Run on these inputs, which lie in the folder; returns the files of the outputs there."""
        return [self._made / name for name in self._exchange(str(self._given), str(self._made))]

    def _exchange(self, given: str, made: str) -> list[str]:
        """Run on the folder ``given``; returns the names of the files that are then in ``made``."""
        self._child.write(f"{given}\t{made}\n".encode())
        return [f"{number}.npy" for number in range(self._receive().outputs)]

    def _receive(self) -> _Reply:
        with self._child.awaited():
            line = self._child.read_line()
        try:
            reply = _Reply.model_validate_json(line)
        except ValidationError as error:
            raise InvalidInput(f"executorch: not our runner, it answers {line!r}") from error
        if reply.error is not None:
            raise InvalidInput(f"executorch: the runner fails: {reply.error}")
        return reply


class _Reply(BaseModel):
    """What is used of a line of the runner."""

    error: str | None = None
    outputs: int = Field(0, ge=0, le=_MOST_OUTPUTS)
