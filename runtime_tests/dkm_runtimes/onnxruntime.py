"""ONNX Runtime on this machine's CPU."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt

from dkm_export.checking.runtime import Arrays, Runtime, Session
from dkm_export.errors import InvalidInput, Unsupported
from dkm_runtimes.precision import numeric_class

_FATAL = 4
"""Severity above which ONNX Runtime logs; errors arrive as exceptions anyway."""

_UNVERIFIED = "ORT model verification failed"
"""Said of an ``.ort`` file with offsets that lead out of it; the status is a mere FAIL."""

_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?")

_LARGEST_FOLDED = "optimization.constant_folding_max_output_size_in_bytes"
"""Entry of the session's configuration: bytes of the largest tensor that is computed at load."""

_LIMITED_FROM = (1, 27)


class OnnxRuntime(Runtime):
    """Runs ``.onnx`` files with ONNX Runtime's default settings, as an app would."""

    name = "onnxruntime"
    target = "onnx"
    where = "native CPU"
    packages = ("onnxruntime",)
    config: ClassVar[dict[str, str]] = {}

    def reported_version(self) -> str:
        """Of the package, whatever its name is."""
        return f"onnxruntime {_version()}"

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
        for key, value in self.config.items():
            options.add_session_config_entry(key, value)
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
            runtime = f"ONNX Runtime {onnxruntime.__version__}"
            raise Unsupported(f"{artifact}: {runtime} cannot run it: {_reason(error)}") from error
        return _OnnxSession(session)


class OrtRuntime(OnnxRuntime):
    """Runs ``.ort`` files, which ONNX Runtime takes as they are: it folds nothing at load."""

    name = "onnxruntime-ort"
    target = "ort"
    where = "native CPU, weights decoded at each inference"


class PackedOnnxRuntime(OnnxRuntime):
    """The same with settings that keep weights packed in RAM: `_LARGEST_FOLDED` of 1 byte."""

    name = "onnxruntime-packed"
    where = "native CPU, weights packed in RAM"
    config: ClassVar[dict[str, str]] = {_LARGEST_FOLDED: "1"}

    def unavailable(self) -> str | None:
        """What is not installed, or so old that it would ignore the setting."""
        missing = super().unavailable()
        if missing:
            return missing
        found = _version()
        if tuple(map(int, found.split(".")[:2])) < _LIMITED_FROM:
            return f"onnxruntime {found} folds weights of any size: install 1.27 or later"
        return None


class _OnnxSession(Session):
    def __init__(self, session: Any) -> None:
        self._session = session
        self.numeric_class = numeric_class(session.get_modelmeta().custom_metadata_map)

    def run(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        outputs: list[npt.NDArray[Any]] = self._session.run(None, dict(inputs))
        return outputs


def _version() -> str:
    try:
        return version("onnxruntime")
    except PackageNotFoundError:  # a package of another name, for GPUs
        import onnxruntime

        return str(onnxruntime.__version__)


def _reason(error: Exception) -> str:
    """The first line, without the status code and the path that stand before it."""
    line = str(error).strip().partition("\n")[0]
    return _PREFIX.sub("", line).rstrip(".")
