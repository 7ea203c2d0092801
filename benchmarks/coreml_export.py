"""Time and memory of a Core ML export: ``python benchmarks/coreml_export.py``.

ResNet-50 by our exporter, beside coremltools' plain conversion of the same dense weights. Writes
benchmarks/coreml_export.md, and exits with 1 when ours takes more than it may. ``--quick`` is a
smoke run of a small network, which writes nothing.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
import warnings
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
    PalettizedModel,
    finalize,
    load_checkpoint,
    prepare,
    save_checkpoint,
)
from dkm_export.quiet import quiet
from dkm_export.references import build_module
from dkm_export.spec import LayerKind

REPORT = Path(__file__).with_suffix(".md")
INTRODUCTION = """# Time and memory of a Core ML export

`python benchmarks/coreml_export.py` wrote this page. `ours` is what `dkm export --target coreml`
does for a checkpoint of ResNet-50 that is loaded and decoded: it traces, converts, and writes a
package with palettes, convolutions at 4 bits for 4 weights and the linear layer at 4 bits for 2.
`coremltools` is `torch.export`, `run_decompositions`, `ct.convert` and `save` of the same decoded
weights, which makes an fp16 package without palettes. Both are for iOS 18.

Every number comes from a fresh process; the two take turns. Imports are not timed; memory is the
process's peak, with everything in it. Ratios are medians over the rounds, with their range.
"""

ROUNDS = 7
LIMITS = {"seconds": 1.3, "megabytes": 1.5}
"""What ours may take, as a multiple of coremltools' own."""

NETWORK = "dkm_models.resnet:resnet50"
SMALL_NETWORK = "dkm_models.resnet:resnet18"


class Job(BaseModel):
    """An export to measure.

    Attributes:
        method: whose.
        checkpoint: of the network.
    """

    method: Literal["ours", "coremltools"]
    checkpoint: Path


class Cost(BaseModel):
    """What an export takes."""

    seconds: float
    megabytes: float


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
    with quiet():
        # the exporter would import it when it needs it
        from dkm_exporters.coreml import conversion  # noqa: F401
    model = load_checkpoint(job.checkpoint)
    module = model.build()
    export = _ours if job.method == "ours" else _theirs
    with tempfile.TemporaryDirectory() as name, quiet():
        started = time.perf_counter()
        export(model, module, Path(name))
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Cost(seconds=seconds, megabytes=peak * (1 if sys.platform == "darwin" else 1024) / 1e6)


def _ours(model: PalettizedModel, module: nn.Module, folder: Path) -> None:
    from dkm_exporters.coreml import CoreMLExporter, CoreMLOptions

    CoreMLExporter().lower(model, module, folder, CoreMLOptions())


def _theirs(model: PalettizedModel, module: nn.Module, folder: Path) -> None:
    import coremltools as ct

    exported = torch.export.export(module, model.source.example_inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = ct.convert(
            exported.run_decompositions({}),
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
    package.save(str(folder / "network.mlpackage"))


def main() -> int:
    """Measure both, or with ``--job`` one for the process that started this one.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smoke run of ResNet-18, one round")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(measure(Job.model_validate_json(options.job)).model_dump_json())
        return 0
    rounds = 1 if options.quick else ROUNDS
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Path(name) / "network.dkm.safetensors"
        make_checkpoint(SMALL_NETWORK if options.quick else NETWORK, checkpoint)
        jobs = {
            method: Job(method=method, checkpoint=checkpoint) for method in ("coremltools", "ours")
        }
        costs, failures = run_in_turn(__file__, jobs, Cost, rounds)
    if failures:
        return 1
    ratios = {
        key: [
            getattr(ours, key) / getattr(theirs, key)
            for ours, theirs in zip(costs["ours"], costs["coremltools"], strict=True)
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
    header = ("", "time", "peak memory", "time / coremltools", "memory / coremltools")
    content = f"{machine(torch.device('cpu'))} Rounds: {rounds}.\n\n{table(header, rows)}"
    print(content)
    if options.quick:
        return 0
    write_report(REPORT, INTRODUCTION, "export", content)
    above = [key for key, limit in LIMITS.items() if median(ratios[key]) > limit]
    for key in above:
        print(f"too much: {key}, at most {LIMITS[key]}x", file=sys.stderr)
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
