"""ONNX Runtime on this machine's CPU."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy.typing as npt

from dkm_export.checking.runtime import Arrays, Runtime, Session
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.plugins import missing_packages
from dkm_runtimes.precision import numeric_class

if TYPE_CHECKING:
    import onnx

_FATAL = 4
"""Severity above which ONNX Runtime logs; errors arrive as exceptions anyway."""

_UNVERIFIED = "ORT model verification failed"
"""Said of an ``.ort`` file with offsets that lead out of it; the status is a mere FAIL."""

_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?")

_LARGEST_FOLDED = "optimization.constant_folding_max_output_size_in_bytes"
"""Entry of the session's configuration: bytes of the largest tensor that is computed at load."""

_LIMITED_FROM = (1, 27)

_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
"""Entry of the session's configuration: where the tensors are that are not in a model's bytes."""


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
        if not artifact.is_file():
            raise InvalidInput(f"{artifact}: no such file")
        return _OnnxSession(self._open(artifact))

    def intermediates(
        self, artifact: Path, inputs: Arrays
    ) -> Iterable[tuple[str, npt.NDArray[Any]]]:
        """Run a copy of the model in which every tensor that depends on the inputs is an output.

        Raises:
            Unsupported: when ONNX Runtime cannot run the copy, or the onnx package is missing.
            InvalidInput: when the file is missing or malformed.
        """
        if missing := missing_packages(("onnx",), "onnx"):
            raise Unsupported(missing)
        import onnx

        model = onnx.load(artifact, load_external_data=False)
        names = _dependent(model.graph)
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        session = self._open(artifact, model.SerializeToString())
        return zip(names, session.run(names, dict(inputs)), strict=True)

    def _open(self, artifact: Path, content: bytes | None = None) -> Any:
        """ONNX Runtime's session of ``content``, which is ``artifact`` or made from it."""
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument, InvalidProtobuf

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL
        for key, value in self.config.items():
            options.add_session_config_entry(key, value)
        if content is not None:
            options.add_session_config_entry(_EXTERNAL_FOLDER, str(artifact.parent))
        try:
            return onnxruntime.InferenceSession(
                artifact if content is None else content,
                options,
                providers=["CPUExecutionProvider"],
            )
        except (InvalidArgument, InvalidProtobuf) as error:
            raise InvalidInput(f"{artifact}: {_reason(error)}: export it again") from error
        except Exception as error:  # a class per status code, without a common base
            if _UNVERIFIED in str(error):
                reason = "malformed or cut short: export it again"
                raise InvalidInput(f"{artifact}: {reason}") from error
            runtime = f"ONNX Runtime {onnxruntime.__version__}"
            raise Unsupported(f"{artifact}: {runtime} cannot run it: {_reason(error)}") from error


class OrtRuntime(OnnxRuntime):
    """Runs ``.ort`` files, which ONNX Runtime takes as they are: it folds nothing at load."""

    name = "onnxruntime-ort"
    target = "ort"
    where = "native CPU, weights decoded at each inference"

    def intermediates(
        self, artifact: Path, inputs: Arrays
    ) -> Iterable[tuple[str, npt.NDArray[Any]]]:
        """None: the outputs of an ``.ort`` file are fixed.

        Raises:
            Unsupported: always.
        """
        raise Unsupported("the outputs of an .ort file are fixed: check the onnx target")


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


def _dependent(graph: onnx.GraphProto) -> list[str]:
    """The tensors that depend on the inputs of a model, which decoded weights do not."""
    names = dict.fromkeys(value.name for value in graph.input)
    for node in graph.node:
        if not names.keys().isdisjoint(node.input):
            names.update(dict.fromkeys(filter(None, node.output)))
    return [name for name in names if name not in {value.name for value in graph.input}]


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
