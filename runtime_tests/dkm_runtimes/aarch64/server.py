"""Holds one ONNX file for `dkm_runtimes.onnx_process`, which describes the frames.

``python server.py FOLDER`` imports ONNX Runtime from FOLDER. It runs in the emulated Python, where
nothing else of this project is.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

_FATAL = 4
"""Severity above which ONNX Runtime logs; errors arrive as exceptions anyway."""


class _Server:
    def __init__(self) -> None:
        self._requests = sys.stdin.buffer
        self._replies = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # whatever else prints

    def serve(self) -> None:
        self._answer(self._load)
        while True:
            request = json.loads(self._read(int.from_bytes(self._read(4), "little")))
            if "open" in request:
                self._answer(self._open, request["open"])
            else:
                # all are read before anything can fail, or the rest would be taken for a frame
                buffers = [self._read(tensor["bytes"]) for tensor in request["run"]]
                self._answer(self._run, request["run"], buffers)

    def _load(self) -> None:
        import numpy
        import onnxruntime

        self._numpy: Any = numpy
        self._onnxruntime: Any = onnxruntime
        self._reply({})

    def _open(self, path: str) -> None:
        options = self._onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL
        self._session: Any = self._onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self._reply({})

    def _run(self, tensors: list[dict[str, Any]], buffers: list[bytes]) -> None:
        inputs = {
            tensor["name"]: self._numpy.frombuffer(data, tensor["type"]).reshape(tensor["shape"])
            for tensor, data in zip(tensors, buffers, strict=True)
        }
        names = [output.name for output in self._session.get_outputs()]
        outputs = [self._numpy.asarray(x) for x in self._session.run(names, inputs)]
        header = [
            {"name": name, "type": x.dtype.name, "shape": x.shape, "bytes": x.nbytes}
            for name, x in zip(names, outputs, strict=True)
        ]
        self._reply({"outputs": header}, *(x.tobytes() for x in outputs))

    def _answer(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do what replies, or reply why it could not be done."""
        try:
            work(*arguments)
        except Exception as error:  # a class per status code, without a common base
            self._reply({"error": str(error) or type(error).__name__})

    def _reply(self, header: dict[str, Any], *payload: bytes) -> None:
        document = json.dumps(header).encode()
        for part in (len(document).to_bytes(4, "little"), document, *payload):
            self._replies.write(part)
        self._replies.flush()

    def _read(self, count: int) -> bytes:
        """The next bytes of stdin; ends the process with its reader."""
        data = self._requests.read(count)
        if len(data) < count:
            sys.exit(0)
        return data


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    _Server().serve()
