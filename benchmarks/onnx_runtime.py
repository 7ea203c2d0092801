"""Load time, memory and latency of ONNX files: ``python benchmarks/onnx_runtime.py``.

Networks at full size, palettized without training, beside their fp32 files and what ONNX Runtime's
own quantizers make of these. Writes benchmarks/onnx_runtime.md, and exits with 1 when ours takes
more than it may. ``--network`` measures some networks only, and ``--quick`` is a smoke run, which
writes nothing. Runs on Linux, and takes about 45 minutes on two cores.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import onnx
import torch
from pydantic import BaseModel
from torch import nn

from benchmarks.full_size import FULL_SIZE, LENGTH, Network
from benchmarks.measuring import (
    duration,
    machine,
    ratios,
    run_in_turn,
    save_samples,
    size,
    spread,
    table,
    write_report,
)
from dkm_export import ModelSource, PalettizedModel
from dkm_export.files import files_below
from dkm_export.quiet import quiet
from dkm_exporters.onnx import OnnxExporter, OnnxOptions
from dkm_exporters.onnx.ort import OrtExporter

REPORT = Path(__file__).with_suffix(".md")
WORKER = str(Path(__file__).with_name("onnx_sessions.py"))

ROUNDS = 7
SECONDS = 3.0
"""For which a process runs a network again and again."""

INTRODUCTION = f"""# ONNX files in ONNX Runtime

`python benchmarks/onnx_runtime.py` wrote this page. Networks have their full size, images 224x224,
texts {LENGTH} tokens; batch 1. All methods start from the same fp32 network, and nothing is trained
afterwards:

- `fp32`: `torch.onnx.export` with `dynamo=True`, in one file, as ours is. By default that writes
  the weights into a file beside the graph, `fp32, two files`: ONNX Runtime maps that into memory,
  which takes less time than any copy. Ratios are to the one file.
- `ours`: one file with palettes, by k-means, batch norm folded before. `folded` is a default
  session, which decodes all weights when it opens the file. `packed` is one that decodes nothing of
  more than 4,096 bytes, and has no arena, as [docs/onnx.md](../docs/onnx.md#ram-and-speed) says.
  `.ort` is [ONNX Runtime's own format](../docs/onnx.md#ort-for-reduced-builds), without an arena.
- `int8`: `quantize_dynamic`, with its defaults. `int4`: `MatMulNBitsQuantizer` for MatMul and
  Gather, blocks of 32, symmetric, and int8 activations (`accuracy_level=4`). It leaves convolutions
  alone, so that networks of these have no row of it.

Error is the relative L2 of the outputs to the fp32 network in PyTorch, and so what the method costs
before any training; ours at these few bits needs it. MiniLM has its real weights and reads real
text. The other networks have **random weights and inputs: their errors say little**.

Every number comes from a fresh process without torch; the methods take turns. Load is the creation
of the session. Latency is the median over {SECONDS:.0f} seconds of runs. Memory is resident memory
over what the process has when it has imported onnxruntime and run a trivial model: after load,
after load and a run, the private part of that (without mapped files), what is in use then (after
`malloc_trim(0)`: the C library keeps much of what was freed at load), and the peak up to then.
Numbers are medians over the rounds, ratios too, with their range.
"""

FP32, FOLDED, PACKED, ORT = "fp32", "ours, folded", "ours, packed", "ours, .ort"
EMBEDDING = "MiniLM's embedding"

LIMITS: Mapping[str, Mapping[str, float]] = {FOLDED: {"latency": 1.03, "load": 1.5}}
"""What ours may take, by method, as a multiple of fp32."""
EMBEDDING_LIMITS: Mapping[str, Mapping[str, float]] = {PACKED: {"ran": 0.25}}
"""The same, of `EMBEDDING`, where nothing is computed that a latency could be told of."""


class Job(BaseModel):
    """What `onnx_sessions.measure` is to do."""

    file: str
    samples: str
    trivial: str
    setting: str = "default"
    decode: int = 4096
    threads: int
    seconds: float


class Cost(BaseModel):
    """What it measured: seconds, MB, and relative L2."""

    load: float
    latency: float
    loaded: float
    ran: float
    private: float
    trimmed: float
    peak: float
    error: float


def _embedding() -> Network:
    """The words of MiniLM alone."""
    whole = FULL_SIZE["MiniLM"]()
    name = "encoder.embeddings.words.weight"
    palette = whole.model.palettes[name]
    rows, width = palette.layout.shape
    source = ModelSource(
        name="embedding",
        factory="torch.nn:Embedding",
        arguments={"num_embeddings": rows, "embedding_dim": width},
        inputs=whole.model.source.inputs[:1],
        outputs=("vectors",),
    )
    module = nn.Embedding(rows, width)
    module.load_state_dict({"weight": whole.module.state_dict()[name]})
    model = PalettizedModel(source, whole.model.spec, {"weight": palette}, {})
    samples = [sample[:1] for sample in whole.samples]
    return Network(module, model, samples, whole.config)


NETWORKS: Mapping[str, Callable[[], Network]] = {**FULL_SIZE, EMBEDDING: _embedding}


def write_files(network: Network, folder: Path) -> dict[str, Path]:
    """A file for each method, in a folder of its own: what lies in it is what an app ships."""
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    names = ("two", "one", "ours", "int8", "int4")
    files = {name: folder / name / f"{network.model.source.name}.onnx" for name in names}
    for file in files.values():
        file.parent.mkdir(parents=True)
    inputs, source = network.samples[0], network.model.source
    with quiet():
        program = torch.onnx.export(
            network.module,
            inputs,
            input_names=[spec.name for spec in source.inputs],
            dynamo=True,
        )
        assert program is not None
        program.save(files["two"], external_data=True)  # what export does when given a file
        program.save(files["one"], external_data=False)
        OnnxExporter().lower(
            network.model, network.model.build(), files["ours"].parent, OnnxOptions()
        )
        (folder / "ort").mkdir()
        ort = OrtExporter().lower(
            network.model, network.model.build(), folder / "ort", OnnxOptions()
        )
        for beside in OrtExporter().files(ort)[1:]:  # what no app ships
            beside.unlink()
        logging.disable(logging.INFO)
        quantize_dynamic(files["one"], files["int8"])
        quantizer = MatMulNBitsQuantizer(
            str(files["one"]),
            block_size=32,
            is_symmetric=True,
            accuracy_level=4,
            op_types_to_quantize=("MatMul", "Gather"),
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(files["int4"]))
    written = {
        FP32: files["one"],
        "fp32, two files": files["two"],
        FOLDED: files["ours"],
        PACKED: files["ours"],
        ORT: ort,
        "int8": files["int8"],
        "int4": files["int4"],
    }
    if not _has_blocks(files["int4"]):
        del written["int4"]
    return written


def _has_blocks(file: Path) -> bool:
    """Whether the 4-bit quantizer found something to do."""
    operators = {node.op_type for node in onnx.load(file).graph.node}
    return bool(operators & {"MatMulNBits", "GatherBlockQuantized"})


def write_trivial(file: Path) -> None:
    """A model that adds a number to itself."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "g", [x], [y])
    imports = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=8), file)


def measure(
    name: str, rounds: int, seconds: float, threads: int
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows of the report on a network, and what is wrong."""
    print(f"{name}: palettizing and exporting", file=sys.stderr, flush=True)
    network = NETWORKS[name]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = write_files(network, folder)
        samples, trivial = folder / "samples.npz", folder / "trivial.onnx"
        save_samples(network.module, network.model.source, network.samples, samples)
        write_trivial(trivial)
        jobs = {
            method: Job(
                file=str(file),
                samples=str(samples),
                trivial=str(trivial),
                setting="packed" if method in (PACKED, ORT) else "default",
                threads=threads,
                seconds=seconds,
            )
            for method, file in files.items()
        }
        costs, failures = run_in_turn(WORKER, jobs, Cost, rounds)
        bytes_ = {
            method: sum(part.stat().st_size for part in files_below(file.parent))
            for method, file in files.items()
        }
    problems = [f"{name}, {method}: {why}" for method, why in failures.items()]
    if FP32 in failures:
        return [], problems
    rows = [
        (
            *(name, network.config if method in (FOLDED, PACKED, ORT) else "", method),
            *_cells(costs[method], costs[FP32], bytes_[method]),
        )
        for method in costs
    ]
    limits = EMBEDDING_LIMITS if name == EMBEDDING else LIMITS
    for method in limits.keys() & costs.keys():
        for key, limit in limits[method].items():
            ratio = median(ratios(costs[method], costs[FP32], key))
            if ratio > limit:
                problems.append(f"{name}, {method}: {key} {ratio:.3f}x of fp32, at most {limit}x")
    return rows, problems


def _cells(ours: Sequence[Cost], theirs: Sequence[Cost], count: int) -> tuple[str, ...]:
    def middle(key: str) -> float:
        return float(median(getattr(cost, key) for cost in ours))

    def with_ratio(key: str, text: Callable[[float], str]) -> str:
        if ours is theirs:
            return text(middle(key))
        return f"{text(middle(key))}, {spread(ratios(ours, theirs, key))}"

    return (
        f"{count:,} B",
        f"{middle('error'):.0e}",
        with_ratio("load", duration),
        with_ratio("latency", duration),
        size(middle("loaded")),
        with_ratio("ran", size),
        size(middle("private")),
        size(middle("trimmed")),
        size(middle("peak")),
    )


def main() -> int:
    """Measure the networks and write the report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--network", action="append", choices=NETWORKS, help="may be repeated; all by default"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each session (default: 1)")
    parser.add_argument("--quick", action="store_true", help="smoke run: one short round")
    options = parser.parse_args()
    rounds, seconds = (1, 0.1) if options.quick else (ROUNDS, SECONDS)
    header = (
        *("network", "bits/dim", "method", "file", "error", "load", "latency"),
        *("RSS after load", "after a run", "of that private", "in use", "peak"),
    )
    problems = []
    for name in options.network or NETWORKS:
        rows, wrong = measure(name, rounds, seconds, options.threads)
        problems += wrong
        facts = machine(torch.device("cpu"), ("onnx", "onnxruntime"))
        threads = f"{options.threads} thread{'s' if options.threads > 1 else ''}"
        content = f"{facts} {threads}, rounds: {rounds}.\n\n{table(header, rows)}"
        print(content)
        if rows and not options.quick:
            write_report(REPORT, INTRODUCTION, name, content)
    for problem in problems:
        print(f"too much: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
