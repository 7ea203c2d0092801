"""Our bytes beside the DKM paper's: ``python benchmarks/paper_sizes.py``.

Each network of the paper at full size, palettized by its recipe without training. Weights are
random, because sizes do not depend on them; accuracies do, and none is claimed here. Writes
benchmarks/paper_sizes.md, and exits with 1 when a network is larger than it may be. Takes a few
minutes on two cores.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from benchmarks.measuring import machine, table, write_report
from benchmarks.networks import without_data
from dkm_export.checkpoint import load_checkpoint, save_checkpoint
from dkm_export.sizing import Account, account
from dkm_export.training.stage import run_recipe

REPORT = Path(__file__).with_suffix(".md")
INTRODUCTION = """# Sizes beside the DKM paper's

`python benchmarks/paper_sizes.py` wrote this page. Every network has its full size and random
weights: sizes do not depend on the weights, accuracies do, and none is claimed here. The paper
(Cho et al., ICLR 2022) counts packed indices and LUTs, with layers under 10,000 parameters, batch
norm and biases at one byte a number, and writes MB for MiB. "Stored" is the real file,
`model.dkm.safetensors`, and the second table accounts for the difference to the byte.
"""


@dataclass(frozen=True)
class Row:
    """A row of the paper.

    Attributes:
        recipe: its name.
        config: bits/dim as the paper writes them.
        paper: its size in MiB and its ratio to float32.
        limit: MiB that ours may have; None where the ratio is what counts.
    """

    recipe: str
    config: str
    paper: tuple[float, float]
    limit: float | None

    def problem(self, ours: Account) -> str | None:
        """Why ours is too large; None when it is not."""
        if self.limit is None:
            if ours.paper_ratio < self.paper[1]:
                return f"{self.recipe}: {ours.paper_ratio:.2f}x, the paper has {self.paper[1]}x"
        elif _mib(ours.paper) > self.limit:
            return f"{self.recipe}: {_mib(ours.paper):.3f} MiB, at most {self.limit} MiB"
        return None


ROWS = (
    Row("resnet50_imagenet", "conv 6/6, fc 6/4", (3.32, 29.4), 3.37),
    Row("mobilenet_v1_imagenet", "conv 4/4, fc 4/2", (0.72, 22.4), 0.73),
    Row("mobilenet_v2_imagenet", "conv 2/1, fc 4/4", (0.84, 15.8), 0.87),
    Row("distilbert_glue", "linear 3/1, embeddings 2/1 (ours)", (21.4, 11.8), None),
)


def measure(name: str, folder: Path) -> Account:
    """Palettize, save, read back, count."""
    started = perf_counter()
    model, _ = run_recipe(without_data(name), lambda *status: None)
    file = folder / f"{name}.dkm.safetensors"
    save_checkpoint(model, file)
    found = account(load_checkpoint(file), file.stat().st_size)
    assert found.stored == file.stat().st_size
    print(f"{name}: {perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def sizes(accounts: Sequence[Account]) -> str:
    """The paper's sizes and ours."""
    header = (
        "network",
        "bits/dim",
        "the paper",
        "ours, counted as the paper does",
        "stored",
        "ratio of what is stored",
    )
    rows = [
        (
            row.recipe,
            row.config,
            f"{row.paper[0]:.2f} MiB, {row.paper[1]}x",
            f"{_mib(found.paper):.3f} MiB ({found.paper / 1e6:.3f} MB), {found.paper_ratio:.1f}x",
            f"{found.stored:,} B ({_mib(found.stored):.3f} MiB)",
            f"{4 * found.parameters / found.stored:.1f}x",
        )
        for row, found in zip(ROWS, accounts, strict=True)
    ]
    return table(header, rows)


def differences(accounts: Sequence[Account]) -> str:
    """Every byte of each file, and where the paper counts less."""
    rows = []
    for row, found in zip(ROWS, accounts, strict=True):
        for line in found.lines:
            difference = line.stored - line.paper
            rows.append((row.recipe, line.kind, f"{line.paper:,}", f"{line.stored:,}", difference))
        total = found.stored - found.paper
        rows.append((row.recipe, "**all**", f"{found.paper:,}", f"{found.stored:,}", total))
    return table(
        ("network", "content", "as the paper counts", "stored", "difference"),
        [(*texts, f"{difference:,}") for *texts, difference in rows],
    )


def main() -> int:
    """Measure everything and write the report; returns the exit code."""
    with tempfile.TemporaryDirectory() as name:
        accounts = [measure(row.recipe, Path(name)) for row in ROWS]
    content = f"{sizes(accounts)}\n\n{machine(torch.device('cpu'))}"
    print(content)
    write_report(REPORT, INTRODUCTION, "sizes", content)
    write_report(REPORT, INTRODUCTION, "differences", differences(accounts))
    problems = [row.problem(found) for row, found in zip(ROWS, accounts, strict=True)]
    for problem in filter(None, problems):
        print(f"too large: {problem}", file=sys.stderr)
    return int(any(problems))


def _mib(count: int) -> float:
    return count / 2**20


if __name__ == "__main__":
    sys.exit(main())
