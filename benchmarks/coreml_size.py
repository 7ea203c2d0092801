"""Bytes of Core ML packages: ``python benchmarks/coreml_size.py``.

Networks at full size, palettized without training and exported, beside coremltools' own
post-training palettization. Weights are random, because sizes do not depend on them. Writes
benchmarks/coreml_size.md, and exits with 1 when a package is larger than it may be. Takes about
ten minutes on two cores.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import coremltools as ct
import torch
from torch import nn

from benchmarks.measuring import machine, table, write_report
from dkm_export import (
    CompressionSpec,
    InputSpec,
    LayerRule,
    ModelSource,
    finalize,
    fold_before_training,
    prepare,
)
from dkm_export.files import files_below
from dkm_export.palettized import BatchNorm
from dkm_export.quiet import quiet
from dkm_export.references import build_module
from dkm_export.spec import LayerKind
from dkm_exporters.coreml import CoreMLExporter, CoreMLOptions

REPORT = Path(__file__).with_suffix(".md")
INTRODUCTION = """# Sizes of Core ML packages

`python benchmarks/coreml_size.py` wrote this page. Networks have their full size, inputs of 224x224
and random weights: sizes do not depend on the weights, accuracies do, and none is claimed here.
Bytes are those of all files of the `.mlpackage`; ratios are to four bytes for each of the network's
parameters.

Ours: convolutions at 4 bits for 4 weights, linear layers at 4 bits for 2, layers under 10,000
weights at 8 bits, the DKM paper's convention. The others are coremltools' own: the package in fp16,
and what its `palettize_weights` makes of it with k-means over single weights, which leaves tensors
of up to 2,048 weights in fp16. Its conversion folds batch norm before. All are for iOS 18.
"""

NETWORKS = {
    "MobileNet-v1": "dkm_models.mobilenet:mobilenet_v1",
    "MobileNet-v2": "dkm_models.mobilenet:mobilenet_v2",
    "ResNet-18": "dkm_models.resnet:resnet18",
    "ResNet-50": "dkm_models.resnet:resnet50",
}
"""Factories by name."""

SPEC = CompressionSpec(
    rules=(LayerRule(bits=4, dim=4), LayerRule(kinds=(LayerKind.LINEAR,), bits=4, dim=2))
)
OURS: tuple[BatchNorm, ...] = ("fold-before-training", "separate")
THEIRS_BITS = (4, 2)

LIMITS = {
    ("MobileNet-v1", "fold-before-training"): 0.76,
    ("MobileNet-v1", "separate"): 0.84,
    ("ResNet-50", "fold-before-training"): 3.55,
}
"""MiB that a package of ours may have."""


@dataclass(frozen=True)
class Row:
    """One package.

    Attributes:
        network: key of `NETWORKS`.
        method: who palettized it, and what became of batch norm.
        config: bits/dim.
        files: bytes by the file's name.
        palettes: bytes of packed indices and float16 tables; None where nobody counted them.
        ratio: how many times smaller than the parameters in float32.
    """

    network: str
    method: str
    config: str
    files: Mapping[str, int]
    palettes: int | None
    ratio: float

    @property
    def total(self) -> int:
        """Bytes of the package."""
        return sum(self.files.values())

    def problem(self) -> str | None:
        """Why the package is too large; None when it is not, or has no limit."""
        limit = LIMITS.get((self.network, self.method))
        if limit is None or self.total <= limit * 2**20:
            return None
        return f"{self.network}, {self.method}: {self.total / 2**20:.3f} MiB, at most {limit} MiB"


def measure(network: str, folder: Path) -> list[Row]:
    """A row for each way to palettize a network."""
    started = perf_counter()
    rows = [_ours(network, batch_norm, folder / batch_norm) for batch_norm in OURS]
    rows += _theirs(network, folder)
    print(f"{network}: {perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return rows


def _ours(network: str, batch_norm: BatchNorm, folder: Path) -> Row:
    source = ModelSource(
        name="network",
        factory=NETWORKS[network],
        inputs=(InputSpec(name="image", shape=(1, 3, 224, 224)),),
        batch_norm=batch_norm,
    )
    module = _network(network)
    parameters = _count(module)
    if batch_norm == "fold-before-training":
        fold_before_training(module, source.example_inputs())
    prepare(module, SPEC)
    model = finalize(module, source)
    folder.mkdir(parents=True)
    with quiet():
        path = CoreMLExporter().lower(model, model.build(), folder, CoreMLOptions())
    palettes = sum(palette.nbytes for palette in model.palettes.values())
    return _row(network, batch_norm, "conv 4/4, fc 4/2", path, palettes, parameters)


def _theirs(network: str, folder: Path) -> list[Row]:
    module = _network(network).eval()
    parameters = _count(module)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, (torch.zeros(1, 3, 224, 224),))
        converted = ct.convert(
            exported.run_decompositions({}),
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
        packages = {"fp16": converted}
        for bits in THEIRS_BITS:
            config = ct.optimize.coreml.OpPalettizerConfig(mode="kmeans", nbits=bits)
            packages[f"{bits}/1"] = ct.optimize.coreml.palettize_weights(
                converted, ct.optimize.coreml.OptimizationConfig(global_config=config)
            )
        rows = []
        for name, package in packages.items():
            path = folder / f"{name.replace('/', '-')}.mlpackage"
            package.save(str(path))
            rows.append(_row(network, "coremltools", name, path, None, parameters))
    return rows


def _network(network: str) -> nn.Module:
    torch.manual_seed(0)
    return build_module(NETWORKS[network], {})


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _row(
    network: str, method: str, config: str, path: Path, palettes: int | None, parameters: int
) -> Row:
    files = {file.name: file.stat().st_size for file in files_below(path)}
    return Row(network, method, config, files, palettes, 4 * parameters / sum(files.values()))


def sizes(rows: Sequence[Row]) -> str:
    """The whole packages."""
    header = ("network", "palettes by", "batch norm", "bits/dim", "package", "ratio to fp32")
    return table(
        header,
        [
            (
                row.network,
                *(("ours", row.method) if row.method in OURS else (row.method, "folded")),
                row.config,
                f"{row.total:,} B ({row.total / 2**20:.3f} MiB)",
                f"{row.ratio:.1f}x",
            )
            for row in rows
        ],
    )


def files(rows: Sequence[Row]) -> str:
    """Where the bytes of each package are."""
    names = sorted({name for row in rows for name in row.files}, reverse=True)
    return table(
        ("network", "", "bits/dim", *names, "of these, indices and tables"),
        [
            (
                *(row.network, row.method, row.config),
                *(f"{row.files[name]:,}" if name in row.files else "" for name in names),
                "" if row.palettes is None else f"{row.palettes:,}",
            )
            for row in rows
        ],
    )


def main() -> int:
    """Measure everything and write the report; returns the exit code."""
    with tempfile.TemporaryDirectory() as name:
        rows = [row for network in NETWORKS for row in measure(network, Path(name) / network)]
    content = f"{sizes(rows)}\n\n{machine(torch.device('cpu'))}"
    print(content)
    write_report(REPORT, INTRODUCTION, "sizes", content)
    write_report(REPORT, INTRODUCTION, "files", files(rows))
    problems = [problem for row in rows if (problem := row.problem())]
    for problem in problems:
        print(f"too large: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
