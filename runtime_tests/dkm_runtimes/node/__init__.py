"""ONNX Runtime for JavaScript: the packages from npm, each in a node process of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from dkm_runtimes.node.npm import install, missing_program
from dkm_runtimes.onnx_process import OnnxProcessRuntime

_HERE = Path(__file__).parent
_RUNNER = _HERE / "runner.mjs"


class OnnxRuntimeNode(OnnxProcessRuntime):
    """``onnxruntime-node``: the native library that Node.js and Electron apps ship."""

    name = "onnxruntime-node"
    where = "native CPU under node"
    version = "1.30.0"
    title = "ONNX Runtime for Node.js"
    program = "node"

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

    def command(self) -> list[str]:
        """Node with our program, which takes the package and the folder that has it."""
        node = shutil.which("node") or "node"
        return [node, str(_RUNNER), self.name, str(self.installation.folder)]


class OnnxRuntimeWeb(OnnxRuntimeNode):
    """``onnxruntime-web`` on its CPU backend, which is what browsers run, without a browser."""

    name = "onnxruntime-web"
    where = "wasm under node, one thread"
    version = "1.30.0"
    title = "ONNX Runtime Web"
