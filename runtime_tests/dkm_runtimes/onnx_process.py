"""A process that holds one ONNX file, and the frames that it and Python exchange.

A frame is the length of a JSON header as uint32, the header, and the bytes of the tensors that it
lists, one after another; all little-endian. The process first replies ``{}``. Then it answers
requests until its input ends: ``{open: path}`` with ``{}``, ``{run: tensors}`` with
``{outputs: tensors}``, and what fails with ``{error: message}``. A tensor is
``{name, type, shape, bytes}``.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dkm_export.checking.runtime import Arrays, InstallableRuntime, Session
from dkm_export.errors import InvalidInput, Unsupported
from dkm_runtimes.child import Child
from dkm_runtimes.precision import numeric_class_of

_LONGEST_HEADER = 1 << 20

# What ONNX Runtime says of a file that is malformed; the rest is what it cannot run.
_MALFORMED = re.compile(
    "rotobuf parsing failed|No graph was found|not have a graph|Invalid model"
    "|External data path|external data file"
)
_PREFIX = re.compile(
    r"^(Can't create a session\. )?(ERROR_CODE: \d+, ERROR_MESSAGE: )?"
    r"(\[ONNXRuntimeError\] : \d+ : \w+ : )?"
    r"(Load model from .*? failed:)?(\S+\.(cc|h):\d+ .*?\) )?"
)


class OnnxProcessRuntime(InstallableRuntime):
    """ONNX Runtime in a process of its own.

    Attributes:
        title: what the package is called in prose.
        program: what runs in the process, for messages.
    """

    packages = ("onnx",)  # reads the metadata, which ONNX Runtime keeps to itself
    target = "onnx"
    title: ClassVar[str]
    program: ClassVar[str]

    @abstractmethod
    def command(self) -> list[str]:
        """The program and its arguments."""

    def load(self, artifact: Path) -> Session:
        """Start a process that opens the file, and the external data beside it.

        Raises:
            Unsupported: for an operator, type or opset that this package does not have, or when
                the package does not load here.
            InvalidInput: when the file is missing or malformed.
        """
        if not artifact.is_file():
            raise InvalidInput(f"{artifact}: there is no such file: export it again")
        session = OnnxProcess(self.name, self.program, self.command())
        try:
            session.open(artifact)
        except OnnxProcessError as error:
            reason = _PREFIX.sub("", str(error)).rstrip(". ")
            if _MALFORMED.search(reason):
                raise InvalidInput(f"{artifact}: {reason}: export it again") from error
            raise Unsupported(
                f"{artifact}: {self.title} {self.version} cannot run it: {reason}"
            ) from error
        return session


class OnnxProcessError(Exception):
    """What ONNX Runtime in the process says went wrong; one line."""


class OnnxProcess(Session):
    """The process ends with this object, and by itself when Python is gone.

    Args:
        package: what messages call the runtime.
        program: what they call the program.
        command: the program and its arguments.

    Raises:
        Unsupported: when the program does not start or does not load the package.
    """

    def __init__(self, package: str, program: str, command: Sequence[str]) -> None:
        self._package = package
        self._program = program
        self._child = Child(f"{package}: {program}", command)
        try:
            self._receive()
        except (OnnxProcessError, InvalidInput) as error:
            raise Unsupported(f"{package} does not load: {error}") from error

    def open(self, artifact: Path) -> None:
        """Load the artifact, by path; when that fails, the process ends.

        Raises:
            OnnxProcessError: when the package refuses it.
            InvalidInput: when the process crashes.
        """
        try:
            self._send({"open": str(artifact.resolve())})
            self._receive()
        except (OnnxProcessError, InvalidInput):
            self._child.end()
            raise
        self.numeric_class = numeric_class_of(artifact)

    def run(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        """Run once.

        Returns:
            The outputs in the model's order.

        Raises:
            InvalidInput: when the package refuses the inputs, or the process crashes.
        """
        arrays = [np.ascontiguousarray(x, x.dtype.newbyteorder("<")) for x in inputs.values()]
        tensors = [
            {"name": name, "type": x.dtype.name, "shape": x.shape, "bytes": x.nbytes}
            for name, x in inputs.items()
        ]
        self._send({"run": tensors}, [x.tobytes() for x in arrays])
        try:
            reply = self._receive()
        except OnnxProcessError as error:
            raise InvalidInput(f"{self._package}: fails on these inputs: {error}") from error
        return [
            np.frombuffer(
                self._child.read(tensor["bytes"]), np.dtype(tensor["type"]).newbyteorder("<")
            ).reshape(tensor["shape"])
            for tensor in reply["outputs"]
        ]

    def _send(self, header: dict[str, Any], payload: Sequence[bytes] = ()) -> None:
        document = json.dumps(header).encode()
        self._child.write(len(document).to_bytes(4, "little"), document, *payload)

    def _receive(self) -> dict[str, Any]:
        """The header of a reply; the bytes that it announces are still to be read."""
        with self._child.awaited():
            length = int.from_bytes(self._child.read(4), "little")
            if length > _LONGEST_HEADER:
                raise InvalidInput(
                    f"{self._package}: something else writes to {self._program}'s output"
                )
            header: dict[str, Any] = json.loads(self._child.read(length))
        if "error" in header:
            raise OnnxProcessError(" ".join(header["error"].split()))
        return header
