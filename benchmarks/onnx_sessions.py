"""What one ONNX Runtime does with files: a worker of `onnx_versions` and `onnx_runtime`.

It needs nothing but numpy and onnxruntime, so that any version can run it, and so that torch is in
no measured process. ``--job JSON`` says what to do; the answer is JSON on stdout.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

Arrays = dict[str, npt.NDArray[Any]]

LIMIT = "optimization.constant_folding_max_output_size_in_bytes"
LIMIT_SINCE = (1, 27)
"""Version of ONNX Runtime that brought the key; earlier ones ignore it."""

_STATUS = Path("/proc/self/status")
_FEWEST_RUNS = 10


def open_session(
    file: str, setting: str, decode: int, threads: int = 0, optimized: str | None = None
) -> Any:
    """A session on the CPU.

    Args:
        file: to open.
        setting: ``default``, ``packed`` (no weight is decoded at load) or ``unoptimized``.
        decode: bytes of a tensor that a packed session may still decode, such as a shape.
        threads: 0 for ONNX Runtime's default.
        optimized: file for the model as the session runs it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = optimized
    disabled = []
    if setting == "packed":
        # the arena would keep the memory of the weights that a run decodes
        options.enable_cpu_mem_arena = False
        if _version() >= LIMIT_SINCE:
            options.add_session_config_entry(LIMIT, str(decode))
        else:
            disabled = ["ConstantFolding"]
    elif setting == "unoptimized":
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    return onnxruntime.InferenceSession(
        file, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )


def check(job: Mapping[str, Any]) -> dict[str, Any]:
    """Errors of every output of every file, or why a file does not run."""
    errors, failures, growth = {}, {}, {}
    for file, samples in job["files"].items():
        with tempfile.TemporaryDirectory() as folder:
            optimized = str(Path(folder) / "optimized.onnx")
            try:
                session = open_session(file, job["setting"], job["decode"], optimized=optimized)
                errors[file] = errors_of(partial(session.run, None), samples)
                growth[file] = Path(optimized).stat().st_size / Path(file).stat().st_size
            except Exception as error:  # a class per status code, without a common base
                failures[file] = (str(error) or repr(error)).splitlines()[0]
    return {"errors": errors, "failures": failures, "growth": growth}


def measure(job: Mapping[str, Any]) -> dict[str, float]:
    """Time and memory of one file, over a process that has opened the file ``trivial``."""
    trivial = open_session(job["trivial"], "default", 0, job["threads"])
    trivial.run(None, {"x": np.zeros(1, np.float32)})
    before = _memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is in use now: proc(5)
    started = time.perf_counter()
    session = open_session(job["file"], job["setting"], job["decode"], job["threads"])
    load = time.perf_counter() - started
    loaded = _memory()
    feed = {name: values[0] for name, values in _samples(job["samples"], "in").items()}
    session.run(None, feed)
    ran = _memory()
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps much of what was freed
    trimmed = _memory()

    seconds: list[float] = []
    while len(seconds) < _FEWEST_RUNS or sum(seconds) < job["seconds"]:
        started = time.perf_counter()
        session.run(None, feed)
        seconds.append(time.perf_counter() - started)
    return {
        "load": load,
        "latency": median(seconds),
        "loaded": loaded["VmRSS"] - before["VmRSS"],
        "ran": ran["VmRSS"] - before["VmRSS"],
        "private": ran["RssAnon"] - before["RssAnon"],
        "trimmed": trimmed["VmRSS"] - before["VmRSS"],
        "peak": ran["VmHWM"] - before["VmRSS"],
        "error": max(errors_of(partial(session.run, None), job["samples"]).values()),
    }


def errors_of(
    run: Callable[[Arrays], Sequence[npt.NDArray[Any]]], samples: str
) -> dict[str, float]:
    """Relative L2 by output, over all samples, of what gives outputs in the model's order."""
    inputs, outputs = _samples(samples, "in"), _samples(samples, "out")
    count = len(next(iter(inputs.values())))
    runs = [run({name: values[index] for name, values in inputs.items()}) for index in range(count)]
    return {
        name: _relative_l2(np.stack([outcome[position] for outcome in runs]), reference)
        for position, (name, reference) in enumerate(outputs.items())
    }


def _relative_l2(output: npt.NDArray[Any], reference: npt.NDArray[Any]) -> float:
    exact = reference.astype(np.float64)
    if output.shape != exact.shape:
        raise ValueError(f"shape {output.shape}, expected {exact.shape}")
    error = np.linalg.norm(output - exact) / np.linalg.norm(exact)
    return float(error) if np.isfinite(error) else sys.float_info.max


def _samples(file: str, side: str) -> Arrays:
    """Inputs (``in``) or outputs (``out``), ``[samples, *shape]`` by name."""
    with np.load(file) as stored:
        return {
            name.partition("/")[2]: stored[name] for name in stored if name.startswith(f"{side}/")
        }


def _memory() -> dict[str, float]:
    """MB of this process by their name in /proc."""
    found = re.findall(r"^(VmHWM|VmRSS|RssAnon):\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return {name: int(kilobytes) * 1024 / 1e6 for name, kilobytes in found}


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])


if __name__ == "__main__":
    given = json.loads(sys.argv[sys.argv.index("--job") + 1])
    print(json.dumps(measure(given) if "seconds" in given else check(given)))
