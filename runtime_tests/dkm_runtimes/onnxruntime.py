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

_UNVERIFIED = "ORT model verification failed"
"""Said of an ``.ort`` file with offsets that lead out of it; the status is a mere FAIL."""

_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?")


class OnnxRuntime(Runtime):
    """Runs ``.onnx`` files with ONNX Runtime's default settings, as an app would."""

    name = "onnxruntime"
    target = "onnx"
    where = "native CPU"
    packages = ("onnxruntime",)

    def load(self, artifact: Path) -> Session:
        """Open a session, which by default decodes all palettes of an ``.onnx`` file once.

        Raises:
            Unsupported: for an operator, type or opset that this ONNX Runtime does not have.
            InvalidInput: when the file is missing or malformed.
        """
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument, InvalidProtobuf

        if not artifact.is_file():
            raise InvalidInput(f"{artifact}: no such file")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL
        try:
            session = onnxruntime.InferenceSession(
                artifact, options, providers=["CPUExecutionProvider"]
            )
        except (InvalidArgument, InvalidProtobuf) as error:
            raise InvalidInput(f"{artifact}: {_reason(error)}: export it again") from error
        except Exception as error:  # a class per status code, without a common base
            if _UNVERIFIED in str(error):
                reason = "malformed or cut short: export it again"
                raise InvalidInput(f"{artifact}: {reason}") from error
            version = onnxruntime.__version__
            raise Unsupported(
                f"{artifact}: ONNX Runtime {version} cannot run it: {_reason(error)}"
            ) from error
        return _OnnxSession(session)


class OrtRuntime(OnnxRuntime):
    """Runs ``.ort`` files, which ONNX Runtime takes as they are: it folds nothing at load."""

    name = "onnxruntime-ort"
    target = "ort"
    where = "native CPU, weights decoded at each inference"


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
