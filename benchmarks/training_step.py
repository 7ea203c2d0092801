"""Measure whole training steps: ``python benchmarks/training_step.py``.

Time and memory of a plain model, of ours and of coremltools' prepared one, printed and written to
benchmarks/training_step.md. ``--device cuda`` fills a section of its own there. ``--quick`` is a
smoke run, which writes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import nn

from benchmarks.measuring import (
    PeakMemory,
    duration,
    machine,
    run_in_turn,
    size,
    spread,
    table,
    write_report,
)
from dkm_export import CompressionSpec, LayerRule, prepare
from dkm_models.mobilenet import mobilenet_v1
from dkm_models.resnet import resnet18

REPORT = Path(__file__).with_suffix(".md")
INTRODUCTION = """# A whole training step

Forward, cross-entropy, backward and a step of SGD with momentum, on random images with torch's
default initialisation. `ours` is the model after `dkm_export.prepare`, `coremltools` after its
DKMPalettizer, each with its own defaults for everything but bits and dim. The two differ there:
ours gives layers below 10,000 weights 8 bits at dim 1 and clusters at a relative temperature,
coremltools leaves layers up to 2,048 weights dense. Both run at most 3 iterations, and stop when
the centroids hardly move: coremltools below 1e-4, ours below 1e-4 of their standard deviation.

Every number comes from fresh processes that take turns, with denormals flushed to zero. A first
step initialises; memory is the peak of the second, over what was in use before the first; times are
the median of the next ones. Ratios are medians over the rounds, with their range.
"""

ROUNDS = 2
MODELS = {
    # bits and dim of convolutions and linear layers
    "ResNet-18": (resnet18, 2, 1),
    "MobileNet-v1": (mobilenet_v1, 4, 4),
}


class Job(BaseModel):
    """A kind of training to measure.

    Attributes:
        model: key of `MODELS`.
        variant: what is done to the model.
        batch: images per step.
        size: height and width of an image.
        steps: steps to time.
        threads: CPU threads; with other work on the machine, one: threads that wait for each other
            at every small operation took up to 15 times as long.
        device: as torch names it.
    """

    model: str
    variant: Literal["plain", "ours", "coremltools"]
    batch: int = 32
    size: int = 224
    steps: int = 3
    threads: int = torch.get_num_threads()
    device: str = "cpu"


class Cost(BaseModel):
    """What a step takes: wall and CPU seconds, and MB."""

    wall: float
    cpu: float
    megabytes: float


def build(job: Job) -> nn.Module:
    """The model in train mode, as the job's variant has it."""
    factory, bits, dim = MODELS[job.model]
    torch.manual_seed(0)
    model: nn.Module = factory()
    if job.variant == "ours":
        prepare(model, CompressionSpec(rules=(LayerRule(bits=bits, dim=dim),)))
    elif job.variant == "coremltools":
        # not installed everywhere, and slow to import
        from coremltools.optimize.torch.palettization import (
            DKMPalettizer,
            DKMPalettizerConfig,
            ModuleDKMPalettizerConfig,
        )

        # Only the first step, which is not measured, initialises: once is enough.
        config = ModuleDKMPalettizerConfig(n_bits=bits, cluster_dim=dim, kmeans_n_init=1)
        palettizer = DKMPalettizer(model, DKMPalettizerConfig(global_config=config))
        model = palettizer.prepare(inplace=True)
        palettizer.step()
    return model.to(job.device).train()


def measure(job: Job) -> Cost:
    """Time and memory of a job, in this process."""
    torch.set_num_threads(job.threads)
    torch.set_flush_denormal(True)
    device = torch.device(job.device)
    model = build(job)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(job.batch, 3, job.size, job.size, generator=generator).to(device)
    labels = torch.randint(1000, (job.batch,), generator=generator).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    memory = PeakMemory(device)
    step()
    memory.restart()
    step()
    megabytes = memory.finish()
    walls, cpus = [], []
    for _ in range(job.steps):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return Cost(wall=median(walls), cpu=median(cpus), megabytes=megabytes)


def compare(model: str, shared: Job, rounds: int) -> list[list[str]]:
    """A row per variant: ratios to the plain model, and what a step takes."""
    print(model, file=sys.stderr)
    jobs = {
        variant: shared.model_copy(update={"model": model, "variant": variant})
        for variant in ("plain", "ours", "coremltools")
    }
    costs, failures = run_in_turn(__file__, jobs, Cost, rounds)
    _, bits, dim = MODELS[model]
    rows = []
    for variant in jobs:
        row = [f"{model}, {bits} bits, dim {dim}", variant]
        if variant in failures:
            rows.append([*row, failures[variant], "", "", ""])
            continue
        for key in Cost.model_fields:
            pairs = zip(costs[variant], costs["plain"], strict=True)
            row.append(spread(getattr(run, key) / getattr(plain, key) for run, plain in pairs))
        wall, cpu, megabytes = (
            median(getattr(run, key) for run in costs[variant]) for key in Cost.model_fields
        )
        rows.append([*row, f"{duration(wall)}, CPU {duration(cpu)}, {size(megabytes)}"])
    return rows


def main() -> None:
    """Measure both models, or with ``--job`` one variant for the process that started this one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="smoke run: one model, two small images"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="1 if the machine is shared"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(measure(Job.model_validate_json(options.job)).model_dump_json())
        return
    shared = Job(model="", variant="plain", threads=options.threads, device=options.device)
    if options.quick:
        shared = shared.model_copy(update={"batch": 2, "size": 64, "steps": 1})
    rounds = 1 if options.quick else ROUNDS
    models = ["MobileNet-v1"] if options.quick else list(MODELS)
    rows = [row for model in models for row in compare(model, shared, rounds)]
    header = ("model", "", "wall time / plain", "CPU time / plain", "memory / plain", "a step")
    content = (
        f"## On {options.device.upper()}\n\n{machine(torch.device(options.device))} "
        f"CPU threads: {shared.threads}, rounds: {rounds}, batches of {shared.batch} at "
        f"{shared.size}x{shared.size}.\n\n{table(header, rows)}"
    )
    print(content)
    if not options.quick:
        write_report(REPORT, INTRODUCTION, options.device, content)


if __name__ == "__main__":
    main()
