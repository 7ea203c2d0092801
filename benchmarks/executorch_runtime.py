"""Load time, memory, latency of ExecuTorch programs: ``python benchmarks/executorch_runtime.py``.

Networks at full size, palettized without training, beside their fp32 XNNPACK programs and those
that torchao's 8da4w quantization makes. Writes benchmarks/executorch_runtime.md, and exits with 1
when ours takes more than it may or computes something else than fp32 does. ``--network`` measures
some networks only, and ``--quick`` is a smoke run, which writes nothing. Runs on Linux, and
takes about 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
    XnnpackDynamicallyQuantizedPartitioner,
    XnnpackPartitioner,
)
from executorch.exir import to_edge_transform_and_lower
from torch import nn

from benchmarks.full_size import FULL_SIZE, LENGTH, Network
from benchmarks.measuring import duration, machine, ratios, size, spread, table, write_report
from dkm_export.errors import Unsupported
from dkm_export.folding import fold_batch_norm
from dkm_export.quiet import quiet
from dkm_exporters.executorch import ExecuTorchExporter, ExecuTorchOptions
from dkm_exporters.executorch.native import RUNNER, built
from dkm_exporters.executorch.options import Backend
from dkm_exporters.executorch.weights_file import WeightsFile

REPORT = Path(__file__).with_suffix(".md")

ROUNDS = 5
SECONDS = 2.0
"""For which a process runs a network again and again."""

INTRODUCTION = f"""# ExecuTorch programs on this CPU

`python benchmarks/executorch_runtime.py` wrote this page. Networks have their full size, images
224x224, texts {LENGTH} tokens; batch 1. All methods start from the same network, and nothing is
trained afterwards:

- `fp32`: stock XNNPACK, with the weights that ours decodes to: the same folded batch norm, the same
  values. "Same" says whether the outputs equal fp32's bit for bit.
- `xnnpack-lut`: ours, with [our delegate](../docs/executorch.md).
- `xnnpack-ptd`: stock XNNPACK and a `.ptd` of dense weights, which the app has made of a small file
  when it was installed. "File" is what is shipped, "on the device" adds what was made there.
- `xnnpack-init`: stock XNNPACK; a method that the app calls first decodes linear layers.
- `portable`: stock kernels that decode each weight at each inference, without XNNPACK.
- `8da4w`: torchao's 4-bit weights in groups of 32 and 8-bit activations, from the fp32 network.
  Convolutions stay fp32, so that networks of these have no row of it.

Error is the relative L2 of the outputs to the fp32 network in PyTorch, and so what the method costs
before any training; ours at these few bits needs it. MiniLM has its real weights and reads real
text. The other networks have **random weights and inputs: their errors say little**.

Every number comes from a fresh process of [our C++ runner](../docs/executorch.md#in-an-app), which
loads programs as apps do (`Module`, mapped into memory), with as many threads as there are cores;
the methods take turns. Load ends when `forward` is ready; the files are in the system's cache, and
for a cold load they are not: then it also depends on the disk. First is the first inference;
latency is the median of all that fit into {SECONDS:.0f} seconds. Memory is the
peak of the process's resident memory up to then. Numbers are medians over the rounds, ratios too,
with their range.
"""

FP32, OURS = "fp32", "xnnpack-lut"
ROUTES: Sequence[Backend] = ("xnnpack-lut", "xnnpack-ptd", "xnnpack-init", "portable")

LIMITS: Mapping[str, float] = {"latency": 1.03, "load": 1.3, "peak": 1.1}
"""What ours may take, as a multiple of fp32."""


@dataclass(frozen=True)
class Program:
    """What a process runs.

    Attributes:
        file: the program.
        shipped: bytes in the app.
        on_device: bytes where it is installed.
        data: weights that the program takes from a file of its own.
    """

    file: Path
    shipped: int
    on_device: int
    data: Path | None = None


@dataclass(frozen=True)
class Cost:
    """What was measured: seconds, MB."""

    load: float
    cold: float
    first: float
    latency: float
    peak: float


def write_programs(network: Network, folder: Path) -> dict[str, Program]:
    """A program for each method that can have the network."""
    inputs = network.model.source.example_inputs()
    dense = network.model.build()
    fold_batch_norm(dense, network.model.palettes, inputs, network.model.ties)
    programs = {FP32: _stock(dense, inputs, folder / "fp32.pte", [XnnpackPartitioner()])}
    for backend in ROUTES:
        route = folder / backend
        route.mkdir()
        options = ExecuTorchOptions(backend=backend)
        exporter = ExecuTorchExporter()
        try:
            exporter.requires(network.model, options)
        except Unsupported as error:
            print(f"  {backend}: {error}", file=sys.stderr)
            continue
        file = exporter.lower(network.model, network.model.build(), route, options)
        shipped = sum(part.stat().st_size for part in exporter.files(file))
        data, made = None, 0
        if backend == "xnnpack-ptd":
            data = route / "weights.ptd"
            WeightsFile.read(exporter.files(file)[1]).expand(data)
            made = data.stat().st_size
        programs[backend] = Program(file, shipped, shipped + made, data)
    quantized = _quantized(network.module)
    if quantized is not None:
        partitioners = [XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()]
        programs["8da4w"] = _stock(quantized, inputs, folder / "8da4w.pte", partitioners)
    return programs


def _stock(
    module: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    file: Path,
    partitioners: list[XnnpackPartitioner],
) -> Program:
    program = torch.export.export(module, inputs)
    lowered = to_edge_transform_and_lower(program, partitioner=partitioners).to_executorch()
    file.write_bytes(lowered.buffer)
    return Program(file, file.stat().st_size, file.stat().st_size)


def _quantized(module: nn.Module) -> nn.Module | None:
    """8da4w, or None where convolutions would stay as they are."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    if any(isinstance(part, nn.Conv2d) for part in module.modules()):
        return None
    quantized = copy.deepcopy(module)
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        weight_granularity=PerGroup(32),
    )
    quantize_(quantized, config, lambda part, _: isinstance(part, nn.Linear))
    return quantized


def start(program: Program, lines: Sequence[str], repeat: int = 1) -> list[dict[str, Any]]:
    """What the runner says of the program and of each line, in a fresh process.

    Raises:
        RuntimeError: when it fails, with the reason.
    """
    data = [] if program.data is None else ["--data", str(program.data)]
    command = [str(built() / RUNNER), str(program.file), *data, "--repeat", str(repeat)]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
    answers: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or len(answers) != 1 + len(lines):
        raise RuntimeError(answers[-1].get("error") if answers else done.stderr.strip())
    return answers


def measure_once(program: Program, line: str, repeat: int) -> Cost:
    """Time and memory of one sample, again and again."""
    for file in (program.file, program.data):
        if file is not None:
            _evict(file)
    (cold,) = start(program, [])
    loaded, ran = start(program, [line], repeat)
    return Cost(
        load=loaded["load_ms"] / 1e3,
        cold=cold["load_ms"] / 1e3,
        first=ran["ms"][0] / 1e3,
        latency=median(ran["ms"][1:]) / 1e3,
        peak=ran["peak_rss_kib"] * 1024 / 1e6,
    )


def _evict(file: Path) -> None:
    """Drop a file from the system's cache."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())  # what is not written yet would stay
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(name: str, rounds: int, seconds: float) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows of the report on a network, and what is wrong."""
    print(f"{name}: palettizing and exporting", file=sys.stderr, flush=True)
    network = FULL_SIZE[name]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with quiet():
            programs = write_programs(network, folder)
        lines = _write_samples(network, folder / "in")
        outputs, repeats = {}, {}
        for method, program in programs.items():
            made = [line.replace("OUT", str(folder / "out" / method)) for line in lines]
            for line in made:
                Path(line.partition("\t")[2]).mkdir(parents=True)
            last = start(program, made)[-1]
            repeats[method] = max(2, round(seconds * 1e3 / last["ms"]))
            outputs[method] = np.stack([_output(line) for line in made])
        costs: dict[str, list[Cost]] = {method: [] for method in programs}
        for turn in range(1, rounds + 1):
            for method, program in programs.items():
                line = lines[0].replace("OUT", str(folder / "out" / method))
                costs[method].append(measure_once(program, line, repeats[method]))
                print(f"  round {turn}: {method}: {costs[method][-1]}", file=sys.stderr, flush=True)
    with torch.no_grad():
        reference = np.stack([network.module(*sample).numpy() for sample in network.samples])
    rows, problems = [], []
    for method, program in programs.items():
        error = np.linalg.norm(outputs[method] - reference) / np.linalg.norm(reference)
        same = np.array_equal(outputs[method].view(np.uint32), outputs[FP32].view(np.uint32))
        rows.append(
            (
                *(name, "" if method in (FP32, "8da4w") else network.config, method),
                f"{program.shipped:,} B",
                f"{program.on_device:,} B" if program.data else "",
                f"{error:.0e}",
                "yes" if same else "no",
                *_cells(costs[method], costs[FP32]),
            )
        )
        if method == OURS and not same:
            problems.append(f"{name}, {method}: outputs are not fp32's")
    for key, limit in LIMITS.items():
        ratio = median(ratios(costs[OURS], costs[FP32], key))
        if ratio > limit:
            problems.append(f"{name}, {OURS}: {key} {ratio:.3f}x of fp32, at most {limit}x")
    return rows, problems


def _write_samples(network: Network, folder: Path) -> list[str]:
    """Inputs as the runner reads them; returns its lines, with OUT for the folder of outputs."""
    lines = []
    for index, sample in enumerate(network.samples):
        place = folder / str(index)
        place.mkdir(parents=True)
        for number, tensor in enumerate(sample):
            np.save(place / f"{number}.npy", tensor.numpy())
        lines.append(f"{place}\tOUT/{index}")
    return lines


def _output(line: str) -> npt.NDArray[np.float32]:
    output: npt.NDArray[np.float32] = np.load(Path(line.partition("\t")[2], "0.npy"))
    return output


def _cells(ours: Sequence[Cost], theirs: Sequence[Cost]) -> tuple[str, ...]:
    def cell(key: str, text: Callable[[float], str]) -> str:
        middle = text(median(getattr(cost, key) for cost in ours))
        return middle if ours is theirs else f"{middle}, {spread(ratios(ours, theirs, key))}"

    texts = {
        "load": duration,
        "cold": duration,
        "first": duration,
        "latency": duration,
        "peak": size,
    }
    return tuple(cell(key, text) for key, text in texts.items())


def main() -> int:
    """Measure the networks and write the report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--network", action="append", choices=FULL_SIZE, help="may be repeated; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="smoke run: one short round")
    options = parser.parse_args()
    rounds, seconds = (1, 0.1) if options.quick else (ROUNDS, SECONDS)
    header = (
        *("network", "bits/dim", "method", "file", "on the device", "error", "same"),
        *("load", "cold load", "first", "latency", "peak RSS"),
    )
    logging.disable(logging.WARNING)
    problems = []
    for name in options.network or FULL_SIZE:
        rows, wrong = measure(name, rounds, seconds)
        problems += wrong
        facts = machine(torch.device("cpu"), ("executorch", "torchao"))
        content = f"{facts} Rounds: {rounds}.\n\n{table(header, rows)}"
        print(content)
        if not options.quick:
            write_report(REPORT, INTRODUCTION, name, content)
    for problem in problems:
        print(f"too much: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
