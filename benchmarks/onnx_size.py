"""Bytes of ONNX files: ``python benchmarks/onnx_size.py``.

Networks at full size, palettized by their recipes without training and exported with each way to
store batch norm and dense tensors. Weights are random, because sizes do not depend on them. Writes
benchmarks/onnx_size.md, and exits with 1 when a file is larger than it may be. ``--quick`` is a
smoke run of MobileNet-v1, which writes nothing. Takes about eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Literal

import onnx
import torch

from benchmarks.measuring import machine, table, write_report
from benchmarks.networks import before_palettizing, without_data
from dkm_export.palettized import BatchNorm
from dkm_export.quiet import quiet
from dkm_export.training.stage import run_recipe
from dkm_exporters.onnx import OnnxExporter, OnnxOptions

REPORT = Path(__file__).with_suffix(".md")
INTRODUCTION = """# Sizes of ONNX files

`python benchmarks/onnx_size.py` wrote this page. Networks have their full size and random weights:
sizes do not depend on the weights, accuracies do, and none is claimed here. Settings are the
recipes', with layers under 10,000 weights at 8 bits; batch norm is folded before training or kept,
and then the exporter folds it into a scale for each channel. Side data are biases, norms, scales
and weights without a palette. Ratios are to four bytes for each of the network's parameters.
"""

SideData = Literal["fp32", "fp16"]
SIDE_DATA: tuple[SideData, ...] = ("fp32", "fp16")
HEADER = ("network", "bits/dim", "batch norm", "side data")


@dataclass(frozen=True)
class Network:
    """A network, and what its files may be.

    Attributes:
        name: as the report has it.
        recipe: an installed one.
        config: bits/dim.
        batch_norms: what to do with batch norm, each in turn.
        settings: other values for keys of the recipe.
        limits: MiB that a file may have, by batch norm and side data.
        ratio: how many times smaller than fp32 every file of it has to be.
    """

    name: str
    recipe: str
    config: str
    batch_norms: tuple[BatchNorm, ...] = ("separate",)
    settings: tuple[str, ...] = ()
    limits: Mapping[tuple[BatchNorm, SideData], float] = field(default_factory=dict)
    ratio: float = 0


NETWORKS = (
    Network(
        "MobileNet-v1",
        "mobilenet_v1_imagenet",
        "conv 4/4, fc 4/2",
        ("fold-before-training", "separate"),
        limits={("fold-before-training", "fp16"): 0.74, ("separate", "fp32"): 0.80},
    ),
    Network(
        "ResNet-50",
        "resnet50_imagenet",
        "conv 6/6, fc 6/4",
        ("fold-before-training", "separate"),
        limits={("fold-before-training", "fp16"): 3.45},
    ),
    Network("DistilBERT", "distilbert_glue", "linear 3/1, embeddings 2/1", ratio=11.8),
    Network(
        "MiniLM",
        "sentence_encoder",
        "linear 3/1, embeddings 2/1",
        settings=("compression.rules=[{kinds=['linear'],bits=3},{kinds=['embedding'],bits=2}]",),
        ratio=11.8,
    ),
)

PARTS = (
    "indices",
    "LUTs",
    "dense tensors",
    "shared tables and constants",
    "table of palettes",
    "nodes and names",
)


@dataclass(frozen=True)
class Row:
    """One file.

    Attributes:
        network: what is in it.
        batch_norm: what became of it.
        side_data: how dense tensors are stored.
        parts: bytes by `PARTS`.
        parameters: of the network.
    """

    network: Network
    batch_norm: BatchNorm
    side_data: SideData
    parts: Mapping[str, int]
    parameters: int

    @property
    def total(self) -> int:
        """Bytes of the file."""
        return sum(self.parts.values())

    @property
    def ratio(self) -> float:
        """How many times smaller than the parameters in float32."""
        return 4 * self.parameters / self.total

    @property
    def name(self) -> tuple[str, ...]:
        """How tables begin."""
        kept = self.batch_norm if len(self.network.batch_norms) > 1 else "none"
        return self.network.name, self.network.config, kept, self.side_data

    def problems(self) -> list[str]:
        """How the file is too large."""
        name, mib = ", ".join(self.name), self.total / 2**20
        limit = self.network.limits.get((self.batch_norm, self.side_data), math.inf)
        found = [f"{name}: {mib:.3f} MiB, at most {limit} MiB"] if mib > limit else []
        if self.ratio < self.network.ratio:
            found.append(f"{name}: {self.ratio:.2f}x, at least {self.network.ratio}x")
        return found


def measure(network: Network, folder: Path) -> list[Row]:
    """A row for each way to store batch norm and dense tensors."""
    started = perf_counter()
    rows = []
    for batch_norm in network.batch_norms:
        settings = (f"model.batch_norm='{batch_norm}'", *network.settings)
        recipe = without_data(network.recipe, settings)
        parameters = sum(tensor.numel() for tensor in before_palettizing(recipe).parameters())
        model, _ = run_recipe(recipe, lambda *status: None)
        for side_data in SIDE_DATA:
            into = folder / network.recipe / batch_norm / side_data
            into.mkdir(parents=True)
            options = OnnxOptions(side_data=side_data)
            with warnings.catch_warnings(), quiet():
                warnings.simplefilter("ignore")  # about what float16 changes: weights are random
                file = OnnxExporter().lower(model, model.build(), into, options)
            rows.append(Row(network, batch_norm, side_data, parts(file), parameters))
    print(f"{network.name}: {perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return rows


def parts(file: Path) -> dict[str, int]:
    """Where the bytes of a file are, by `PARTS`."""
    model = onnx.load(file)
    found = dict.fromkeys(PARTS, 0)
    for tensor in model.graph.initializer:
        found[_part(tensor)] += len(tensor.raw_data)
    found["table of palettes"] = sum(entry.ByteSize() for entry in model.metadata_props)
    found["nodes and names"] = file.stat().st_size - sum(found.values())
    return found


def _part(tensor: onnx.TensorProto) -> str:
    if tensor.name.endswith(".indices"):
        return "indices"
    if tensor.name.endswith(".lut"):
        return "LUTs"
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return "dense tensors" if tensor.data_type in floats else "shared tables and constants"


def sizes(rows: Sequence[Row]) -> str:
    """The whole files."""
    return table(
        (*HEADER, "file", "ratio to fp32"),
        [
            (*row.name, f"{row.total:,} B ({row.total / 2**20:.3f} MiB)", f"{row.ratio:.1f}x")
            for row in rows
        ],
    )


def accounts(rows: Sequence[Row]) -> str:
    """Where the bytes of each file are."""
    return table(
        (*HEADER, *PARTS),
        [(*row.name, *(f"{row.parts[part]:,}" for part in PARTS)) for row in rows],
    )


def main() -> int:
    """Measure everything and write the report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smoke run of MobileNet-v1")
    options = parser.parse_args()
    networks = NETWORKS[:1] if options.quick else NETWORKS
    with tempfile.TemporaryDirectory() as name:
        rows = [row for network in networks for row in measure(network, Path(name))]
    content = f"{sizes(rows)}\n\n{machine(torch.device('cpu'), ('onnx', 'onnxscript'))}"
    print(f"{content}\n\n{accounts(rows)}")
    if not options.quick:
        write_report(REPORT, INTRODUCTION, "sizes", content)
        write_report(REPORT, INTRODUCTION, "parts", accounts(rows))
    problems = [problem for row in rows for problem in row.problems()]
    for problem in problems:
        print(f"too large: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
