"""Measure the clustering of one weight: ``python benchmarks/clustering.py``.

Time and memory of one forward and backward pass through the clustering, beside coremltools and
plain autograd, printed and written to benchmarks/clustering.md. ``--device cuda`` fills a section
of its own there. ``--quick`` is a smoke run, which writes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
from dkm_export import CompressionSpec, DkmSettings, LayerRule, prepare
from dkm_export.palette import Layout

REPORT = Path(__file__).with_suffix(".md")
INTRODUCTION = """# Clustering of one weight

One forward and backward pass through the clustering of one weight: the effective weight, and the
gradient of a fixed random cotangent. `ours` is a layer of `dkm_export.prepare` in train mode,
`coremltools` one of its DKMPalettizer, `autograd` the formulas of the DKM paper in plain torch.
Weights are normal, standard deviation 0.02; all start from the same centroids and run all three
iterations (no early exit) at tau = 1e-4, on one thread, with denormals flushed to zero.

Every number comes from fresh processes that take turns: time is the CPU time of a step, the median
of 2 to 9 after a first one, and memory what the first step needs at most over what was in use
before it. Ratios are medians over the rounds, with their range.
"""

ROUNDS = 2
TAU = 1e-4
LARGE = (512, 512, 3, 3)
SMALL = ((64, 32), (160, 128), (200, 200), (512, 512))
STEP_SECONDS = 10.0


class Job(BaseModel):
    """One clustering to measure.

    Attributes:
        implementation: whose; ``float64`` is autograd in that precision, for the gradients.
        shape: of the weight.
        bits: bits per index.
        dim: weights per index.
        tau: temperature.
        tau_unit: see `DkmSettings`; other implementations know "absolute" only.
        gradient: see `DkmSettings`; other implementations know "unrolled" only.
        iterations: k-means iterations of a step.
        steps: most steps to time.
        device: as torch names it.
        save: file for the gradient of the first step.
    """

    implementation: Literal["ours", "coremltools", "autograd", "float64"]
    shape: tuple[int, ...]
    bits: int
    dim: int
    tau: float = TAU
    tau_unit: Literal["absolute", "inertia"] = "absolute"
    gradient: Literal["unrolled", "implicit", "jacobian-free"] = "unrolled"
    iterations: int = 3
    steps: int = 9
    device: str = "cpu"
    save: Path | None = None


class Cost(BaseModel):
    """What a step takes: seconds, and MB."""

    seconds: float
    megabytes: float


class Clustering(NamedTuple):
    """A parameter, and how to compute the effective weight from it."""

    parameter: Tensor
    weight: Callable[[], Tensor]

    def step(self, cotangent: Tensor) -> None:
        self.parameter.grad = None
        self.weight().backward(cotangent)


def dense_layer(shape: Sequence[int]) -> nn.Module:
    """A layer with the weight that all implementations cluster."""
    layer: nn.Conv2d | nn.Linear
    if len(shape) == 4:
        layer = nn.Conv2d(shape[1], shape[0], shape[2], bias=False)
    else:
        layer = nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        layer.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    return layer


def ours(job: Job) -> Clustering:
    """A layer prepared by this package, in train mode."""
    layer = dense_layer(job.shape)
    keys = {"tau", "tau_unit", "iterations", "gradient"} & DkmSettings.model_fields.keys()
    settings = {"eps": 0.0, **job.model_dump(include=keys)}
    spec = CompressionSpec(rules=(LayerRule(bits=job.bits, dim=job.dim),), small_layer_size=0)
    prepare(layer, spec, DkmSettings.model_validate(settings))
    layer.to(job.device).train()
    parameter = layer.get_parameter("parametrizations.weight.original")

    def weight() -> Tensor:
        effective = layer.weight
        assert isinstance(effective, Tensor)
        return effective

    return Clustering(parameter, weight)


def start(job: Job) -> Tensor:
    """The centroids from which ours begins, float32 ``[k, dim]``.

    Others get them too: their own way to initialise is no part of a step, and can take minutes.
    """
    layer = dense_layer(job.shape)
    spec = CompressionSpec(rules=(LayerRule(bits=job.bits, dim=job.dim),), small_layer_size=0)
    prepare(layer, spec)
    return layer.get_buffer("parametrizations.weight.0.centroids")[0].to(job.device)


def coremltools(job: Job) -> Clustering:
    """The same layer prepared by coremltools, with its defaults for everything that is not ours."""
    # not installed everywhere, and slow to import
    from coremltools.optimize.torch.palettization import (
        DKMPalettizer,
        DKMPalettizerConfig,
        ModuleDKMPalettizerConfig,
    )

    config = ModuleDKMPalettizerConfig(
        n_bits=job.bits,
        cluster_dim=job.dim,
        weight_threshold=0,  # small layers too
        palett_tau=job.tau,
        kmeans_max_iter=job.iterations,
        palett_epsilon=-1.0,  # no change of the inertia is that small: never stops early
    )
    model = nn.Sequential(dense_layer(job.shape)).to(job.device)
    palettizer = DKMPalettizer(model, DKMPalettizerConfig(global_config=config))
    layer = palettizer.prepare(inplace=True)[0]
    palettizer.step()
    assert layer.weight_fake_quant.fake_palett_enabled == 1
    layer.weight_fake_quant.centroids = [start(job)]
    return Clustering(layer.weight, lambda: layer.weight_fake_quant(layer.weight))


def autograd(job: Job) -> Clustering:
    """The paper's formulas, differentiated by torch (section 3: W~ = A C after the last update)."""
    dtype = torch.float64 if job.implementation == "float64" else torch.float32
    parameter = nn.Parameter(dense_layer(job.shape).get_parameter("weight").to(job.device, dtype))
    layout = Layout(job.shape, job.dim)
    state = start(job).to(dtype)

    def iteration(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        attention = torch.softmax(torch.cdist(vectors, centroids).square() / -job.tau, dim=-1)
        return attention, attention.T @ vectors / attention.sum(0).unsqueeze(1)

    def weight() -> Tensor:
        nonlocal state
        vectors, centroids = layout.to_vectors(parameter)[0], state
        for _ in range(job.iterations):
            if job.implementation == "float64":  # would not fit into memory otherwise
                attention, centroids = checkpoint(
                    iteration, vectors, centroids, use_reentrant=False
                )
            else:
                attention, centroids = iteration(vectors, centroids)
        state = centroids.detach()
        effective: Tensor = layout.from_vectors((attention @ centroids)[None])
        return effective

    return Clustering(parameter, weight)


BUILDERS = {"ours": ours, "coremltools": coremltools, "autograd": autograd, "float64": autograd}


def measure(job: Job) -> Cost:
    """Time and memory of a job, in this process."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    device = torch.device(job.device)
    build = BUILDERS[job.implementation]
    # Whatever a library loads at its first step is no part of a step: let it at a tiny one.
    build(job.model_copy(update={"shape": SMALL[0], "bits": 1})).step(
        torch.ones(SMALL[0], device=device)
    )
    clustering = build(job)
    cotangent = torch.randn(job.shape, generator=torch.Generator().manual_seed(1))
    cotangent = cotangent.to(clustering.parameter)
    memory = PeakMemory(device)
    clustering.step(cotangent)
    megabytes = memory.finish()
    if job.save:
        assert clustering.parameter.grad is not None
        torch.save(clustering.parameter.grad.cpu(), job.save)
    seconds: list[float] = []
    while len(seconds) < job.steps and (len(seconds) < 2 or sum(seconds) < STEP_SECONDS):
        seconds.append(timed(lambda: clustering.step(cotangent), device))
    return Cost(seconds=median(seconds) if seconds else 0.0, megabytes=megabytes)


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a step: of all CPU threads of this process, or of the GPU."""
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        step()
        last.record()
        torch.cuda.synchronize(device)
        return float(first.elapsed_time(last)) / 1e3
    begin = time.process_time()
    step()
    return time.process_time() - begin


def name(job: Job) -> str:
    """As in ``512x512x3x3, k=16, d=4``."""
    return f"{'x'.join(map(str, job.shape))}, k={1 << job.bits}, d={job.dim}"


def cost(runs: Sequence[Cost]) -> str:
    """As in ``0.23 s, 194 MB``."""
    seconds, megabytes = (median(getattr(run, key) for run in runs) for key in Cost.model_fields)
    return f"{duration(seconds)}, {size(megabytes)}"


def ratios(runs: Sequence[Cost], base: Sequence[Cost], key: str) -> str:
    """How many times ``base`` the others take, round by round."""
    pairs = [(getattr(run, key), getattr(own, key)) for run, own in zip(runs, base, strict=True)]
    # Resident memory comes in pages and in heaps that grow by steps: below 1 MB it says nothing.
    if key == "megabytes" and min(own for _, own in pairs) < 1:
        return "-"
    return spread(run / own for run, own in pairs)


def comparison(cases: Iterable[Job], rounds: int) -> str:
    """The implementations beside each other, and how exact their gradients are."""
    peers = ("coremltools", "autograd")
    rows, errors = [], []
    for case in cases:
        print(name(case), file=sys.stderr)
        with TemporaryDirectory() as folder:
            files = {each: Path(folder) / each for each in BUILDERS}
            jobs = {
                each: case.model_copy(update={"implementation": each, "save": files[each]})
                for each in BUILDERS
            }
            reference = {"float64": jobs.pop("float64").model_copy(update={"steps": 0})}
            costs, failures = run_in_turn(__file__, jobs, Cost, rounds)
            failures |= run_in_turn(__file__, reference, Cost, 1)[1]
            gradients = {
                each: torch.load(file).double() for each, file in files.items() if file.exists()
            }
        own = costs["ours"]
        row = [name(case)]
        for peer in peers:
            if peer in failures:
                row += [failures[peer], ""]
            else:
                row += [ratios(costs[peer], own, key) for key in Cost.model_fields]
        row += [cost(costs[each]) if each in costs else "" for each in ("ours", *peers)]
        rows.append(row)
        exact = gradients.get("float64")
        errors.append([name(case)])
        for each in ("ours", *peers):
            if exact is None or each not in gradients:
                errors[-1].append("")
            else:
                errors[-1].append(f"{(gradients[each] - exact).norm() / exact.norm():.1e}")
    header = [
        "weight",
        *(f"{peer} / ours, {what}" for peer in peers for what in ("time", "memory")),
    ]
    header += ["ours", *peers]
    return "\n\n".join(
        [
            table(header, rows),
            "Error of the gradient, relative L2 to autograd in float64:",
            table(["weight", "ours", *peers], errors),
        ]
    )


def growth(cases: Iterable[Job], rounds: int) -> str:
    """Ours at 3 and at 30 iterations."""
    rows = []
    for case in cases:
        print(f"{name(case)}: iterations", file=sys.stderr)
        jobs = {str(n): case.model_copy(update={"iterations": n}) for n in (3, 30)}
        costs, _ = run_in_turn(__file__, jobs, Cost, rounds)
        memory, time_ = (ratios(costs["30"], costs["3"], key) for key in ("megabytes", "seconds"))
        rows.append((name(case), memory, time_, cost(costs["3"]), cost(costs["30"])))
    header = ("ours", "30 / 3 iterations, memory", "30 / 3, time", "3 iterations", "30 iterations")
    return table(header, rows)


def modes(cases: Iterable[Job], rounds: int) -> str:
    """Ours with other temperatures and other ways to the gradient."""
    variants = {"tau 1e-4": {}, "tau 0.05 x inertia": {"tau": 0.05, "tau_unit": "inertia"}}
    if "gradient" in DkmSettings.model_fields:
        for mode in ("implicit", "jacobian-free"):
            variants[f"tau 1e-4, {mode}"] = {"gradient": mode}
            variants[f"tau 0.05 x inertia, {mode}"] = {
                **variants["tau 0.05 x inertia"],
                "gradient": mode,
            }
    rows: list[Sequence[str]] = []
    for case in cases:
        print(f"{name(case)}: modes", file=sys.stderr)
        jobs = {key: case.model_copy(update=update) for key, update in variants.items()}
        costs, failures = run_in_turn(__file__, jobs, Cost, rounds)
        base = costs["tau 1e-4"]
        for key in variants:
            if key in failures:
                rows.append((name(case), key, failures[key], "", ""))
                continue
            row = (ratios(costs[key], base, each) for each in Cost.model_fields)
            rows.append((name(case), key, *row, cost(costs[key])))
    header = ("ours", "temperature, gradient", "time / tau 1e-4", "memory / tau 1e-4", "cost")
    return table(header, rows)


def main() -> None:
    """Measure all cases, or with ``--job`` one of them for the process that started this one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smoke run of small cases")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(measure(Job.model_validate_json(options.job)).model_dump_json())
        return

    def case(shape: tuple[int, ...], bits: int, dim: int) -> Job:
        steps = 2 if options.quick else 9
        return Job(
            implementation="ours",
            shape=shape,
            bits=bits,
            dim=dim,
            steps=steps,
            device=options.device,
        )

    rounds = 1 if options.quick else ROUNDS
    large = SMALL[-1] if options.quick else LARGE
    shapes = SMALL[:1] if options.quick else SMALL
    small = [case(shape, 4, dim) for shape in shapes for dim in (1, 4)]
    sections = {
        "Beside others": comparison(
            [case(large, 4, 1), case(large, 4, 4), case(large, 8, 4), *small], rounds
        ),
        "More iterations": growth([case(large, 4, 1), case(large, 4, 4)], rounds),
        "Low temperatures and other gradients": modes(
            [case(large, 4, 1), case(large, 8, 1), case(large, 8, 4)], rounds
        ),
    }
    device = torch.device(options.device)
    content = (
        f"## On {options.device.upper()}\n\n{machine(device)} One CPU thread, rounds: {rounds}."
    )
    for title, section in sections.items():
        content += f"\n\n### {title}\n\n{section}"
    print(content)
    if not options.quick:
        write_report(REPORT, INTRODUCTION, options.device, content)


if __name__ == "__main__":
    main()
