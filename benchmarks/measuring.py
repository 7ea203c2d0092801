"""What the benchmarks share: fresh processes, peak memory, Markdown.

A script measures each job in a process of its own: it starts itself again with ``--job JSON`` and
prints the result as JSON. What one library leaves behind (threads, caches, a heap that has grown)
is then no part of another's numbers.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dkm_export import ModelSource

Result = TypeVar("Result", bound=BaseModel)

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def run_in_turn(
    script: str,
    jobs: Mapping[str, BaseModel],
    result: type[Result],
    rounds: int,
    python: str = sys.executable,
    echo: bool = True,
) -> tuple[dict[str, list[Result]], dict[str, str]]:
    """Each job in a fresh process, all of them once per round, so that noise hits all alike.

    Args:
        script: the benchmark, which understands ``--job``.
        jobs: by name.
        result: what the script prints for a job.
        rounds: times to run each job.
        python: what runs the script.
        echo: show what each job printed.

    Returns:
        One result per round, by name of the job; and why other jobs failed.
    """
    results: dict[str, list[Result]] = {}
    failures: dict[str, str] = {}
    for number in range(1, rounds + 1):
        for name, job in jobs.items():
            if name in failures:
                continue
            print(f"  round {number}: {name}", end="", flush=True, file=sys.stderr)
            command = [python, script, "--job", job.model_dump_json()]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = done.stderr.strip() or f"stopped by signal {-done.returncode}"
                failures[name] = said.splitlines()[-1]
                print(f": {said}", file=sys.stderr)
                continue
            line = done.stdout.splitlines()[-1]
            results.setdefault(name, []).append(result.model_validate_json(line))
            print(f": {line if echo else 'done'}", file=sys.stderr)
    return {name: runs for name, runs in results.items() if name not in failures}, failures


def save_samples(
    module: nn.Module, source: ModelSource, inputs: Sequence[tuple[Tensor, ...]], file: Path
) -> None:
    """Write samples for `onnx_sessions`: ``in/<name>`` and ``out/<name>``, ``[samples, *shape]``.

    Args:
        module: computes the outputs.
        source: names inputs and outputs.
        inputs: of each sample.
        file: with the suffix ``.npz``.
    """
    with torch.no_grad():
        outputs = [module(*sample) for sample in inputs]
    rows = [output if isinstance(output, tuple) else (output,) for output in outputs]
    arrays = {
        f"{side}/{name}": torch.stack(column).numpy()
        for side, names, columns in (
            ("in", [spec.name for spec in source.inputs], zip(*inputs, strict=True)),
            ("out", source.outputs, zip(*rows, strict=True)),
        )
        for name, column in zip(names, columns, strict=True)
    }
    np.savez(file, allow_pickle=False, **arrays)


class PeakMemory:
    """The most memory in use since the last `restart`, over what was in use at first.

    On a GPU it is memory of torch's tensors, on Linux the process's resident memory. Elsewhere the
    high-water mark cannot be set back, which makes the result a lower bound.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Freed blocks of 64 kB and more leave at once: a heap with holes would count as in use.
        _set_allocator(mmap_threshold=1 << 16, trim_threshold=1 << 16)
        self._start = self.restart()

    def restart(self) -> int:
        """Forget the peak so far; returns the bytes in use now."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        elif _CLEAR.exists():
            ctypes.CDLL(None).malloc_trim(0)
            _CLEAR.write_text("5")  # the high-water mark becomes what is in use now: man 5 proc
        return self._high_water()

    def finish(self) -> float:
        """The peak over the start, in MB. Timing can follow: the allocator is fast again."""
        peak = self._high_water()
        # where glibc's own thresholds end up in a process that works with large tensors
        _set_allocator(mmap_threshold=32 << 20, trim_threshold=64 << 20)
        return (peak - self._start) / 1e6

    def _high_water(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device)
        if _STATUS.exists():
            found = re.search(r"^VmHWM:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
            assert found
            return int(found[1]) * 1024
        import resource  # does not exist on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024


def _set_allocator(mmap_threshold: int, trim_threshold: int) -> None:
    """Which blocks glibc takes from and gives back to the system one by one: man 3 mallopt."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, mmap_threshold)
        libc.mallopt(-1, trim_threshold)


def ratios(ours: Sequence[object], theirs: Sequence[object], key: str) -> list[float]:
    """Of the attribute ``key`` of two methods' costs, by round."""
    return [getattr(a, key) / getattr(b, key) for a, b in zip(ours, theirs, strict=True)]


def spread(ratios: Iterable[float]) -> str:
    """Median and range, as in ``8.10x (7.92..8.43)``; no range when there is none."""
    ordered = sorted(ratios)
    middle, first, last = (_digits(x) for x in (median(ordered), ordered[0], ordered[-1]))
    return f"{middle}x" if first == last else f"{middle}x ({first}..{last})"


def duration(seconds: float) -> str:
    """As in ``4.77 ms`` or ``6.29 s``."""
    return f"{_digits(1e3 * seconds)} ms" if seconds < 0.1 else f"{_digits(seconds)} s"


def size(megabytes: float) -> str:
    """As in ``8.02 MB`` or ``6,473 MB``."""
    return f"{_digits(megabytes)} MB"


def _digits(value: float) -> str:
    """Three digits, or all of those before the point."""
    decimals = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{decimals}f}"


def machine(device: torch.device, packages: Sequence[str] = ("coremltools",)) -> str:
    """Hardware, versions of torch and these packages, and date, in one sentence."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_processor()}, {os.cpu_count()} cores"
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", *packages):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    return f"{hardware}; {', '.join(versions)}; {date.today().isoformat()}."


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_section(text: str, marker: str, content: str) -> str:
    """``text`` with other content between ``<!-- marker -->`` and ``<!-- end -->``."""
    start, end = f"<!-- {marker} -->\n", "<!-- end -->"
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(end)
    assert found, f"no section {marker}"
    assert ended, f"section {marker} does not end"
    return f"{before}{start}{content}\n{end}{after}"


def section(text: str, marker: str) -> str:
    """What stands between ``<!-- marker -->`` and ``<!-- end -->``."""
    _, found, rest = text.partition(f"<!-- {marker} -->\n")
    assert found, f"no section {marker}"
    return rest.partition("<!-- end -->")[0]


def write_report(path: Path, introduction: str, marker: str, content: str) -> None:
    """Write the introduction and one section of a report; the other sections stay as they are."""
    before = path.read_text() if path.exists() else ""
    _, start, sections = before.partition("<!-- ")
    text = f"{introduction}\n{start}{sections}" if start else introduction
    if f"<!-- {marker} -->" not in text:
        text += f"\n<!-- {marker} -->\n<!-- end -->\n"
    path.write_text(replace_section(text, marker, content))
