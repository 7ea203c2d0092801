"""Plans beside uniform recipes of the same size: ``python benchmarks/planning.py PART``.

PART is ``glyphs`` or ``minilm`` (accuracy after training and without), ``sizes`` (predicted bytes
of three targets beside those of the files) or ``speed`` (ResNet-50). Each writes its section of
benchmarks/planning.md and exits with 1 when a plan is worse than the uniform recipe by more than
the seeds differ, too large or too small, wrongly predicted or too slow. On two cores they take
about three hours.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.measuring import PeakMemory, machine, table, write_report
from benchmarks.minilm import TEST_PACKAGES, TRAIN_PACKAGES, recipe_of, sentences
from benchmarks.networks import without_data
from dkm_export.checkpoint import save_checkpoint
from dkm_export.errors import Unsupported
from dkm_export.exporting.export import choose_targets, export
from dkm_export.palettized import PalettizedModel
from dkm_export.planning.candidates import candidates
from dkm_export.planning.mockup import artifact_bytes, mock_up
from dkm_export.planning.planner import Budget, Question, make_plan
from dkm_export.quiet import quiet
from dkm_export.references import build_module
from dkm_export.spec import CompressionSpec
from dkm_export.task import Batch, Task, batches_of, metric_of, output_of
from dkm_export.training.recipe import Recipe, find_recipe, load_recipe
from dkm_export.training.stage import float_model, run_recipe

REPORT = Path(__file__).with_suffix(".md")
INTRODUCTION = """# Plans

`python benchmarks/planning.py PART` wrote the sections of this page. A uniform recipe gives all
layers the same bits and dim, and layers under 10,000 weights 8 bits, as in the DKM paper. `dkm
plan` gets the bytes of its ONNX file as the budget, and the same float weights. Both are then
palettized without training, and fine-tuned by the same recipe with the same batches in the same
order. For Core ML and ExecuTorch there are plans of their own, for the bytes of the uniform
recipe's file of that target where it can hold it, with seed 0. Top-1 (glyphs) and cosine to the
float model's embeddings (MiniLM) are of the test split, which the plan does not see: means over the
seeds. `dkm plan` measures the errors of layers of glyphs, and predicts those of MiniLM from
gradients, by itself. A seed decides the float weights (glyphs), the examples that the plan is made
from, the batches and the initial centroids. Differences are those of two models of one seed, with
their standard error: one that is less than two of these may be chance.
"""

UNIFORM = ((2, 1), (4, 4), (4, 1), (3, 1))
TARGETS = ("onnx", "coreml", "executorch")

LEAST = 0.99
"""Share of the budget that a plan has to use."""

MINILM_SENTENCES = (256, 300)
MINILM = ("dkm.epochs=1",)

SPEED_SECONDS, SPEED_BYTES = 180, 3e9
"""What planning ResNet-50 may take."""


@dataclass(frozen=True)
class Subject:
    """A network.

    Attributes:
        make: its recipe, in a folder and with a seed.
        seeds: so many, from 0.
        examples: that plans measure sensitivities on.
        draws: how often the test split is gone through, by other seeds of the task's.
    """

    make: Callable[[Path, int], Recipe]
    seeds: int
    examples: int
    draws: int


@dataclass(frozen=True)
class Row:
    """One uniform setting with one seed.

    Attributes:
        sizes: by target, bytes of the plan's artifact and of the uniform recipe's, which was the
            budget; of other targets than ONNX with one seed.
        metrics: uniform and plan without training, uniform and plan after it.
        float32: the metric of the float model.
    """

    setting: str
    sizes: dict[str, tuple[int, int]]
    metrics: tuple[float, float, float, float]
    float32: float


def silent(*status: object) -> None:
    """No progress."""


def glyphs(folder: Path, seed: int) -> Recipe:
    """The recipe `glyphs` with float weights of the seed, trained here."""
    recipe = load_recipe(find_recipe("glyphs"), [f"seed={seed}"])
    model, _, _ = float_model(recipe, silent)
    weights = folder / "glyphs.safetensors"
    save_file(model.state_dict(), weights)
    return load_recipe(
        find_recipe("glyphs"), [f"seed={seed}", "train.epochs=0", f"model.weights='{weights}'"]
    )


def minilm(folder: Path, seed: int) -> Recipe:
    """The recipe `sentence_encoder` with the package's weights and few sentences."""
    for split, packages, count in zip(
        ("train", "test"), (TRAIN_PACKAGES, TEST_PACKAGES), MINILM_SENTENCES, strict=True
    ):
        (folder / f"{split}.txt").write_text("\n".join(sentences(packages, count)))
    return recipe_of(folder, 4, 1, [*MINILM, f"seed={seed}"])


def compressed(recipe: Recipe, spec: CompressionSpec, *, trained: bool) -> PalettizedModel:
    """By the recipe, but with this spec."""
    update: dict[str, object] = {"compression": spec}
    if not trained:
        update["dkm"] = recipe.dkm.model_copy(update={"epochs": 0, "warmup_epochs": 0.0})
    return run_recipe(recipe.model_copy(update=update), silent)[0]


def drawn(recipe: Recipe, draws: int) -> list[Batch]:
    """So many draws of the test split."""
    task = task_of(recipe)
    return [batch for seed in range(draws) for batch in batches_of(task, "test", 256, seed)]


def metric(module: nn.Module, recipe: Recipe, batches: Sequence[Batch]) -> float:
    """The task's, over these."""
    with torch.no_grad():
        outputs = [output_of(module, inputs) for inputs, _ in batches]
    targets = [target for _, target in batches]
    return metric_of(task_of(recipe), torch.cat(outputs), torch.cat(targets))


def task_of(recipe: Recipe) -> Task:
    """Which all recipes here have."""
    assert recipe.task is not None
    return recipe.task.load()


def uniform(bits: int, dim: int) -> CompressionSpec:
    """One rule for all layers."""
    return CompressionSpec.model_validate({"rules": [{"bits": bits, "dim": dim}]})


def bytes_of(mock: PalettizedModel, target: str) -> int:
    """Of a mock-up's artifact."""
    return artifact_bytes(mock, choose_targets([target]), verbose=False)[target]


def exported_bytes(model: PalettizedModel, target: str) -> int:
    """Of the artifact that ``dkm export`` writes."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        save_checkpoint(model, Path(name, "model.dkm.safetensors"))
        manifest = export(Path(name), [target], Path(name, "out"), data=None)
    return manifest.artifacts[0].bytes


def compare(subject: Subject, seed: int) -> list[Row]:
    """All settings with one seed; in a process of its own with one thread."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = perf_counter()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = subject.make(folder, seed)
        model, _, _ = float_model(recipe, silent)
        batches = drawn(recipe, subject.draws)
        float32 = metric(model, recipe, batches)

        def planned_for(target: str, spec: CompressionSpec) -> tuple[int, CompressionSpec]:
            """The bytes of a uniform recipe's artifact, and a plan of that size."""
            budget = bytes_of(mock_up(model, recipe.source(), spec), target)
            question = Question(
                choose_targets([target]),
                examples=subject.examples,
                file=folder / "sensitivities.json",
            )
            return budget, make_plan(recipe, Budget(limit=budget), question, silent)[1]

        for bits, dim in UNIFORM:
            spec = uniform(bits, dim)
            budget, planned = planned_for("onnx", spec)
            models = [
                compressed(recipe, which, trained=trained)
                for trained in (False, True)
                for which in (spec, planned)
            ]
            sizes = {"onnx": (exported_bytes(models[-1], "onnx"), budget)}
            for target in TARGETS[1:] if seed == 0 else ():
                try:
                    budget, planned = planned_for(target, spec)
                except Unsupported:  # the uniform recipe
                    continue
                without = compressed(recipe, planned, trained=False)
                sizes[target] = exported_bytes(without, target), budget
            values = tuple(metric(model.build(), recipe, batches) for model in models)
            row = Row(f"{bits}/{dim}", sizes, values, float32)  # type: ignore[arg-type]
            rows.append(row)
            minutes = (perf_counter() - started) / 60
            print(f"{minutes:.1f} min: seed {seed}: {row}", file=sys.stderr, flush=True)
    return rows


def accuracy(subject: Subject, facts: str) -> tuple[str, list[str]]:
    """The section of a network, and what is not as it should be."""
    # one thread each: threads of one small network wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        seeds = list(pool.map(compare, [subject] * subject.seeds, range(subject.seeds)))
    float32 = mean(rows[0].float32 for rows in seeds)
    facts += f" {subject.seeds} seeds; the float models reach {float32:.2f}."
    content = f"{facts}\n\n{comparison(seeds)}\n\n{used(seeds)}"
    return content, problems_of(seeds)


def comparison(seeds: Sequence[Sequence[Row]]) -> str:
    """The table of metrics, a row for each setting."""
    lines = []
    for rows in zip(*seeds, strict=True):
        metrics = columns(rows)
        cells = []
        for theirs, ours in (metrics[:2], metrics[2:]):
            difference, error = difference_of(theirs, ours)
            cells += [
                f"{mean(theirs):.2f}",
                f"{mean(ours):.2f}",
                f"{difference:+.2f} ± {error:.2f}",
            ]
        lines.append((rows[0].setting, f"{rows[0].sizes['onnx'][1]:,} B", *cells))
    header = (
        *("uniform setting", "ONNX file"),
        *("uniform, no training", "plan, no training", "difference"),
        *("uniform, fine-tuned", "plan, fine-tuned", "difference"),
    )
    return table(header, lines)


def columns(rows: Sequence[Row]) -> list[tuple[float, ...]]:
    """The four metrics of a setting, each by seed."""
    return list(zip(*(row.metrics for row in rows), strict=True))


def difference_of(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds, and its standard error."""
    differences = [our - their for their, our in zip(theirs, ours, strict=True)]
    return mean(differences), stdev(differences) / len(differences) ** 0.5


def used(seeds: Sequence[Sequence[Row]]) -> str:
    """How much of their budgets the plans used, a sentence."""
    words = []
    for target in TARGETS:
        found = [row.sizes.get(target) for rows in seeds for row in rows]
        shares = [100 * planned / budget for planned, budget in filter(None, found)]
        words.append(f"{target} {min(shares):.2f} to {max(shares):.2f} % ({len(shares)} plans)")
    return f"Plans used of their budgets: {', '.join(words)}."


def problems_of(seeds: Sequence[Sequence[Row]]) -> list[str]:
    """Plans that are worse, too small or too large."""
    problems = []
    for rows in zip(*seeds, strict=True):
        setting = rows[0].setting
        metrics = columns(rows)
        for when, (theirs, ours) in (("without", metrics[:2]), ("after", metrics[2:])):
            difference, error = difference_of(theirs, ours)
            if difference < -2 * error:
                problems.append(f"{setting} {when} training: {difference} ± {error}")
        for target, (planned, budget) in (x for row in rows for x in row.sizes.items()):
            if not LEAST * budget <= planned <= budget:
                problems.append(f"{setting}, {target}: {planned} bytes of {budget}")
    return problems


def glyphs_section() -> tuple[str, list[str]]:
    """62 characters."""
    subject = Subject(glyphs, seeds=4, examples=512, draws=5)
    recipe = load_recipe(find_recipe("glyphs"))
    facts = (
        f"Glyphs, top-1 in percent over {subject.draws} draws of the test images; "
        f"{recipe.dkm.epochs} epochs of fine-tuning."
    )
    return accuracy(subject, facts)


def minilm_section() -> tuple[str, list[str]]:
    """A real sentence encoder."""
    train, test = MINILM_SENTENCES
    facts = (
        "all-MiniLM-L6-v2, cosine to its own float embeddings in percent; fine-tuned for one "
        f"epoch of only {train} sentences, tested on {test}."
    )
    return accuracy(Subject(minilm, seeds=3, examples=128, draws=1), facts)


def sizes_section() -> tuple[str, list[str]]:
    """Bytes that were predicted, beside those of the files."""
    lines, problems = [], []
    for name, rules in (
        ("digits", "{bits=4,dim=2}"),
        ("glyphs", "{bits=3}"),
        ("mobilenet_v1_imagenet", "{bits=4,dim=4}"),
        ("mobilenet_v2_imagenet", "{bits=2}"),
        ("resnet18_imagenet", "{bits=4,dim=4}"),
        ("resnet50_imagenet", "{bits=6,dim=4}"),
        ("distilbert_glue", "{bits=3}"),
        ("sentence_encoder", "{bits=2}"),
    ):
        recipe = without_data(name, [f"compression.rules=[{rules}]"])
        for target, predicted, real in _predicted(recipe):
            off = 100 * (predicted / real - 1)
            lines.append((name, target, f"{predicted:,} B", f"{real:,} B", f"{off:+.3f} %"))
            print(lines[-1], file=sys.stderr, flush=True)
            if abs(off) > 1:
                problems.append(f"{name}, {target}: predicted {predicted}, is {real}")
    facts = (
        "Recipes with their networks at full size and one rule for all layers: bytes of a mock-up "
        "with random palettes, from which plans predict, beside those of the file that "
        "`dkm export` writes."
    )
    header = ("recipe", "target", "predicted", "exported", "off by")
    return f"{facts}\n\n{table(header, lines)}", problems


def _predicted(recipe: Recipe) -> list[tuple[str, int, int]]:
    """Bytes by target: of a mock-up, and of the file."""
    model, _, _ = float_model(recipe, silent)
    mock = mock_up(model, recipe.source(), recipe.compression)
    palettized, _ = run_recipe(recipe, silent)
    return [
        (target, bytes_of(mock, target), exported_bytes(palettized, target)) for target in TARGETS
    ]


def speed_section() -> tuple[str, list[str]]:
    """How long a plan for ResNet-50 takes, and how much memory."""
    recipe = without_data("resnet50_imagenet")
    memory = PeakMemory(torch.device("cpu"))
    started = perf_counter()
    warnings.simplefilter("ignore")
    budget = Budget(limit=3_300_000)
    targets = choose_targets(["onnx"])
    plan, _ = make_plan(recipe, budget, Question(targets), silent)
    seconds, megabytes = perf_counter() - started, memory.finish()
    model = build_module(recipe.model.factory, recipe.model.arguments)
    layers = candidates(model, recipe.compression, (), (), targets)
    settings = [len(layer.settings) for layer in layers]
    content = (
        f"`dkm plan resnet50_imagenet --budget 3.3MB --target onnx` (random weights, 224x224): "
        f"{len(plan.layers)} layers with {min(settings)} to {max(settings)} settings each, in "
        f"{seconds:.0f} s and {megabytes / 1e3:.2f} GB over the memory of a Python with torch; the "
        f"file has {plan.bytes['onnx']:,} of 3,300,000 bytes, and the error is "
        f"{plan.error / plan.bound:.4f} times the lower bound."
    )
    slow = seconds > SPEED_SECONDS or megabytes * 1e6 > SPEED_BYTES
    return content, ["slower or larger than it may be"] if slow else []


PARTS = {
    "glyphs": glyphs_section,
    "minilm": minilm_section,
    "sizes": sizes_section,
    "speed": speed_section,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a part and write its section; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    part = parser.parse_args(arguments).part
    started = perf_counter()
    content, problems = PARTS[part]()
    minutes = (perf_counter() - started) / 60
    content = f"{machine(torch.device('cpu'))} It took {minutes:.0f} minutes.\n\n{content}"
    print(content)
    write_report(REPORT, INTRODUCTION, part, content)
    for problem in problems:
        print(f"not as it should be: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
