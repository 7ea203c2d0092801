"""A node process that holds one artifact, and the frames that it and Python exchange.

A frame is the length of a JSON header as uint32, the header, and the bytes of the tensors that it
lists, one after another; all little-endian. `runner.mjs` has the other end.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dkm_export.checking.runtime import Arrays, Session
from dkm_export.errors import InvalidInput, Unsupported
from dkm_runtimes.precision import numeric_class_of

_RUNNER = Path(__file__).with_name("runner.mjs")


_PATIENCE = 600
"""Seconds that one inference may take; then the process is killed, which ends the wait."""

_LONGEST_HEADER = 1 << 20


class NodeError(Exception):
    """What the package in the process says went wrong; one line."""


class NodeSession(Session):
    """The process ends with this object, and by itself when Python is gone.

    Args:
        package: the npm package to run.
        folder: the folder that has it in its ``node_modules``.

    Raises:
        Unsupported: when node does not start or does not load the package.
    """

    def __init__(self, package: str, folder: Path) -> None:
        self._package = package
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 a pipe that nobody reads would fill up
        node = shutil.which("node") or "node"
        try:
            self._process = subprocess.Popen(
                [node, str(_RUNNER), package, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
            )
        except OSError as error:
            raise Unsupported(f"{package}: {node} does not start: {error.strerror}") from error
        weakref.finalize(self, _end, self._process, self._log)
        try:
            self._receive()
        except (NodeError, InvalidInput) as error:
            raise Unsupported(f"{package} does not load: {error}") from error

    def open(self, artifact: Path) -> None:
        """Load the artifact, by path.

        Raises:
            NodeError: when the package refuses it.
            InvalidInput: when the process crashes.
        """
        self._send({"open": str(artifact.resolve())})
        self._receive()
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
        except NodeError as error:
            raise InvalidInput(f"{self._package}: fails on these inputs: {error}") from error
        return [
            np.frombuffer(
                self._read(tensor["bytes"]), np.dtype(tensor["type"]).newbyteorder("<")
            ).reshape(tensor["shape"])
            for tensor in reply["outputs"]
        ]

    def _send(self, header: dict[str, Any], payload: Sequence[bytes] = ()) -> None:
        document = json.dumps(header).encode()
        stdin = self._process.stdin
        assert stdin is not None
        try:
            for part in (len(document).to_bytes(4, "little"), document, *payload):
                stdin.write(part)
            stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def _receive(self) -> dict[str, Any]:
        """The header of a reply; the bytes that it announces are still to be read."""
        watchdog = threading.Timer(_PATIENCE, self._process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            length = int.from_bytes(self._read(4), "little")
            if length > _LONGEST_HEADER:
                raise InvalidInput(f"{self._package}: something else writes to node's output")
            header: dict[str, Any] = json.loads(self._read(length))
        finally:
            watchdog.cancel()
        if "error" in header:
            raise NodeError(" ".join(header["error"].split()))
        return header

    def _read(self, count: int) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None
        data = stdout.read(count)
        if len(data) < count:
            raise self._ended()
        return data

    def _ended(self) -> InvalidInput:
        """The error for a process that is gone, with the last that it said."""
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        last = next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")
        return InvalidInput(f"{self._package}: node ended with code {code}{last}")


def _end(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, log):
        assert stream is not None
        try:
            stream.close()
        except OSError:  # unsent bytes, to a process that is gone
            continue
