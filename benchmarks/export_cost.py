"""Time and memory of an export: ``python benchmarks/export_cost.py``.

ResNet-50 by our exporters, each beside the plain conversion that its target has without palettes,
of the same dense weights. Writes benchmarks/export_cost.md, and exits with 1 when ours takes more
than it may. ``--target`` measures some targets only, and ``--quick`` is a smoke run of a small
network, which writes nothing. Takes about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from pydantic import BaseModel
from torch import nn

from benchmarks.measuring import (
    duration,
    machine,
    run_in_turn,
    size,
    spread,
    table,
    write_report,
)
from dkm_export import (
    CompressionSpec,
    InputSpec,
    LayerRule,
    ModelSource,
    finalize,
    load_checkpoint,
    prepare,
    save_checkpoint,
)
from dkm_export.plugins import EXPORTERS, discover
from dkm_export.quiet import quiet
from dkm_export.references import build_module
from dkm_export.spec import LayerKind

REPORT = Path(__file__).with_suffix(".md")
INTRODUCTION = """# Time and memory of an export

`python benchmarks/export_cost.py` wrote this page. `ours` is what `dkm export` does for a
checkpoint of ResNet-50 that is loaded and decoded, convolutions at 4 bits for 4 weights and the
linear layer at 4 bits for 2. Beside it is the plain conversion of the same decoded weights, which
makes no palettes. Reading the artifact back, which `dkm export` does afterwards, is not in it.

- coreml: ours traces, converts, and writes a package with palettes. `coremltools` is
  `torch.export`, `run_decompositions`, `ct.convert` and `save`, which makes an fp16 package. Both
  are for iOS 18.
- onnx: ours folds batch norm, traces, replaces weights by their decoders, infers shapes, removes
  notes for debugging, has `onnx.checker` look at the model, and writes it. `torch.onnx.export` has
  `dynamo=True` and its defaults, so it also runs its optimizer, and it writes fp32 weights.

Every number comes from a fresh process; the two take turns. Imports are not timed; memory is the
process's peak, with everything in it. Ratios are medians over the rounds, with their range.
"""

ROUNDS = 7
NETWORK = "dkm_models.resnet:resnet50"
SMALL_NETWORK = "dkm_models.resnet:resnet18"

Inputs = tuple[torch.Tensor, ...]


class Job(BaseModel):
    """An export to measure.

    Attributes:
        target: key of `BASELINES`.
        method: whose.
        checkpoint: of the network.
    """

    target: str
    method: Literal["ours", "theirs"]
    checkpoint: Path


class Cost(BaseModel):
    """What an export takes."""

    seconds: float
    megabytes: float


@dataclass(frozen=True)
class Baseline:
    """What an exporter of ours is measured beside.

    Attributes:
        name: as the report has it.
        warm_up: imports what an export imports late.
        export: the conversion, into a folder.
        limits: what ours may take, as a multiple.
        packages: whose versions the report names.
    """

    name: str
    warm_up: Callable[[], object]
    export: Callable[[nn.Module, Inputs, Path], object]
    limits: Mapping[str, float]
    packages: tuple[str, ...]


def _import_coreml() -> None:
    from dkm_exporters.coreml import conversion  # noqa: F401


def _export_coreml(module: nn.Module, inputs: Inputs, folder: Path) -> None:
    import coremltools as ct

    exported = torch.export.export(module, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = ct.convert(
            exported.run_decompositions({}),
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
    package.save(str(folder / "network.mlpackage"))


def _import_onnx() -> None:
    from dkm_exporters.onnx import artifact, decoding, tracing  # noqa: F401

    # torch imports its exporter and fills its table of operators with the first export
    torch.onnx.export(nn.ReLU(), (torch.zeros(1),), dynamo=True, verbose=False)


def _export_onnx(module: nn.Module, inputs: Inputs, folder: Path) -> None:
    torch.onnx.export(module, inputs, folder / "network.onnx", dynamo=True)


BASELINES = {
    "coreml": Baseline(
        "coremltools",
        _import_coreml,
        _export_coreml,
        {"seconds": 1.3, "megabytes": 1.5},
        ("coremltools",),
    ),
    "onnx": Baseline(
        "torch.onnx.export",
        _import_onnx,
        _export_onnx,
        {"seconds": 1.5},
        ("onnx", "onnxscript"),
    ),
}
"""By target."""


def make_checkpoint(factory: str, path: Path) -> None:
    """Palettize the network without training, and save it."""
    torch.manual_seed(0)
    module = build_module(factory, {})
    rules = (LayerRule(bits=4, dim=4), LayerRule(kinds=(LayerKind.LINEAR,), bits=4, dim=2))
    prepare(module, CompressionSpec(rules=rules))
    source = ModelSource(
        name="network",
        factory=factory,
        inputs=(InputSpec(name="image", shape=(1, 3, 224, 224)),),
    )
    save_checkpoint(finalize(module, source), path)


def measure(job: Job) -> Cost:
    """Export in this process."""
    baseline, exporter = BASELINES[job.target], discover(EXPORTERS)[job.target]
    with quiet():
        baseline.warm_up()
    model = load_checkpoint(job.checkpoint)
    module, inputs = model.build(), model.source.example_inputs()
    with tempfile.TemporaryDirectory() as name, quiet():
        started = time.perf_counter()
        if job.method == "ours":
            exporter.lower(model, module, Path(name), exporter.options())
        else:
            baseline.export(module, inputs, Path(name))
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Cost(seconds=seconds, megabytes=peak * (1 if sys.platform == "darwin" else 1024) / 1e6)


def compare(target: str, checkpoint: Path, rounds: int) -> tuple[str, list[str]] | None:
    """The report's section on a target, and what takes too much; None when an export fails."""
    baseline = BASELINES[target]
    jobs = {
        baseline.name: Job(target=target, method="theirs", checkpoint=checkpoint),
        "ours": Job(target=target, method="ours", checkpoint=checkpoint),
    }
    costs, failures = run_in_turn(__file__, jobs, Cost, rounds)
    if failures:
        return None
    ratios = {
        key: [
            getattr(ours, key) / getattr(theirs, key)
            for ours, theirs in zip(costs["ours"], costs[baseline.name], strict=True)
        ]
        for key in Cost.model_fields
    }
    rows = [
        (
            method,
            duration(median(cost.seconds for cost in costs[method])),
            size(median(cost.megabytes for cost in costs[method])),
            *((spread(ratios[key]) for key in ratios) if method == "ours" else ("", "")),
        )
        for method in jobs
    ]
    shares = (f"{what} / {baseline.name}" for what in ("time", "memory"))
    facts = f"{machine(torch.device('cpu'), baseline.packages)} Rounds: {rounds}."
    content = f"{facts}\n\n{table(('', 'time', 'peak memory', *shares), rows)}"
    problems = [
        f"{target}: {key}, at most {limit}x"
        for key, limit in baseline.limits.items()
        if median(ratios[key]) > limit
    ]
    return content, problems


def main() -> int:
    """Measure the targets, or with ``--job`` one export for the process that started this one.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--target", action="append", choices=BASELINES, help="may be repeated; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="smoke run of ResNet-18, one round")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(measure(Job.model_validate_json(options.job)).model_dump_json())
        return 0
    sections = {}
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Path(name) / "network.dkm.safetensors"
        make_checkpoint(SMALL_NETWORK if options.quick else NETWORK, checkpoint)
        for target in options.target or BASELINES:
            sections[target] = compare(target, checkpoint, 1 if options.quick else ROUNDS)
    code = 0
    for target, found in sections.items():
        if found is None:
            code = 1
            continue
        content, problems = found
        print(f"{target}: {content}\n")
        if options.quick:
            continue
        write_report(REPORT, INTRODUCTION, target, content)
        for problem in problems:
            print(f"too much: {problem}", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
