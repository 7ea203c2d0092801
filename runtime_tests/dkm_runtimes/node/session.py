"""A node process that holds one artifact, and the frames that it and Python exchange.

A frame is the length of a JSON header as uint32, the header, and the bytes of the tensors that it
lists, one after another; all little-endian. `runner.mjs` has the other end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dkm_export.checking.runtime import Arrays, Session
from dkm_export.errors import InvalidInput, Unsupported
from dkm_runtimes.child import Child
from dkm_runtimes.precision import numeric_class_of

_RUNNER = Path(__file__).with_name("runner.mjs")


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
        node = shutil.which("node") or "node"
        self._child = Child(f"{package}: node", [node, str(_RUNNER), package, str(folder)])
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
                raise InvalidInput(f"{self._package}: something else writes to node's output")
            header: dict[str, Any] = json.loads(self._child.read(length))
        if "error" in header:
            raise NodeError(" ".join(header["error"].split()))
        return header
