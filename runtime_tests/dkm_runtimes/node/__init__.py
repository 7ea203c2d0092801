"""ONNX Runtime for JavaScript: the packages from npm, each in a node process of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from dkm_export.checking.runtime import InstallableRuntime, Session
from dkm_export.errors import InvalidInput, Unsupported
from dkm_runtimes.node.npm import install, missing_program
from dkm_runtimes.node.session import NodeError, NodeSession

_HERE = Path(__file__).parent

# What both packages say of a file that is malformed; the rest is what they cannot run.
_MALFORMED = re.compile(
    "rotobuf parsing failed|No graph was found|not have a graph|Invalid model"
    "|External data path|external data file"
)
_PREFIX = re.compile(
    r"^(Can't create a session\. )?(ERROR_CODE: \d+, ERROR_MESSAGE: )?"
    r"(Load model from .*? failed:)?(\S+\.(cc|h):\d+ .*?\) )?"
)


class OnnxRuntimeNode(InstallableRuntime):
    """``onnxruntime-node``: the native library that Node.js and Electron apps ship.

    Attributes:
        title: what the package is called in prose.
    """

    name = "onnxruntime-node"
    target = "onnx"
    where = "native CPU under node"
    version = "1.30.0"
    title: ClassVar[str] = "ONNX Runtime for Node.js"

    def unavailable(self) -> str | None:
        """Why this runtime cannot run here, or None."""
        return super().unavailable() or missing_program("node")

    def download(self, folder: Path, progress: Callable[[str], None]) -> None:
        """Let npm install what the package's lock file pins, without running its scripts.

        Raises:
            Unsupported: when node or npm is missing or fails, with the reason.
        """
        progress(f"{self.name} {self.version}: npm ci")
        install(self.name, _HERE / self.name, folder)

    def load(self, artifact: Path) -> Session:
        """Start a node process that opens the file, and the external data beside it.

        Raises:
            Unsupported: for an operator, type or opset that this package does not have, or when
                the package does not load here.
            InvalidInput: when the file is missing or malformed.
        """
        if not artifact.is_file():
            raise InvalidInput(f"{artifact}: there is no such file: export it again")
        session = NodeSession(self.name, self.installation.folder)
        try:
            session.open(artifact)
        except NodeError as error:
            reason = _PREFIX.sub("", str(error)).rstrip(". ")
            if _MALFORMED.search(reason):
                raise InvalidInput(f"{artifact}: {reason}: export it again") from error
            raise Unsupported(
                f"{artifact}: {self.title} {self.version} cannot run it: {reason}"
            ) from error
        return session


class OnnxRuntimeWeb(OnnxRuntimeNode):
    """``onnxruntime-web`` on its CPU backend, which is what browsers run, without a browser."""

    name = "onnxruntime-web"
    where = "wasm under node, one thread"
    version = "1.30.0"
    title = "ONNX Runtime Web"
