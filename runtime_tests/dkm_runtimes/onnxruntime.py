"""ONNX Runtime on this machine's CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy.typing as npt

from dkm_export.checking.runtime import Arrays, NumericClass, Runtime, Session
from dkm_export.errors import InvalidInput, Unsupported

_FATAL = 4
"""Severity above which ONNX Runtime logs; errors arrive as exceptions anyway."""

_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?")


class OnnxRuntime(Runtime):
    """Runs ``.onnx`` files with ONNX Runtime's default settings, as an app would."""

    name = "onnxruntime"
    target = "onnx"
    where = "native CPU"
    packages = ("onnxruntime",)

    def load(self, artifact: Path) -> Session:
        """Open a session, which by default decodes all palettes once.

        Raises:
            Unsupported: for an operator, type or opset that this ONNX Runtime does not have.
            InvalidInput: when the file is missing or malformed.
        """
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import (
            InvalidArgument,
            InvalidProtobuf,
            NoSuchFile,
        )

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL
        try:
            session = onnxruntime.InferenceSession(
                artifact, options, providers=["CPUExecutionProvider"]
            )
        except (InvalidArgument, InvalidProtobuf, NoSuchFile) as error:
            raise InvalidInput(f"{artifact}: {_reason(error)}: export it again") from error
        except Exception as error:  # a class per status code, without a common base
            version = onnxruntime.__version__
            raise Unsupported(
                f"{artifact}: ONNX Runtime {version} cannot run it: {_reason(error)}"
            ) from error
        return _OnnxSession(session)


class _OnnxSession(Session):
    numeric_class = NumericClass.FP32

    def __init__(self, session: Any) -> None:
        self._session = session

    def run(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        outputs: list[npt.NDArray[Any]] = self._session.run(None, dict(inputs))
        return outputs


def _reason(error: Exception) -> str:
    """The first line, without the status code and the path that stand before it."""
    line = str(error).strip().partition("\n")[0]
    return _PREFIX.sub("", line).rstrip(".")
