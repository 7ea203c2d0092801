"""Measure the tables of README.md and write them into it: ``python benchmarks/readme_tables.py``.

Digits: three seeds, trained, exported, and evaluated on every runtime that is here. MobileNet-v1:
random weights at 224x224, so sizes and parity only. The other tables are copied from the pages that
their own benchmarks wrote. Takes about ten minutes on two cores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

import dkm_models
from benchmarks.measuring import replace_section, section, table
from dkm_export.checking.check import check
from dkm_export.checking.report import Report, Status
from dkm_export.checkpoint import save_checkpoint
from dkm_export.exporting.export import export
from dkm_export.files import CHECKPOINT
from dkm_export.training.recipe import load_recipe
from dkm_export.training.stage import run_recipe

README = Path(__file__).parents[1] / "README.md"
RECIPES = Path(dkm_models.__path__[0]) / "recipes"
SEEDS = (0, 1, 2)
COPIED = {
    "paper-sizes": ("paper_sizes.md", "sizes"),
    "glyphs-accuracy": ("accuracy.md", "methods"),
    "plans": ("planning.md", "glyphs"),
    "encoder": ("minilm.md", "settings"),
    "encoder-plans": ("planning.md", "minilm"),
}
"""Sections of README.md, and where their tables come from."""


def measure(recipe: str, folder: Path, overrides: Sequence[str]) -> tuple[Report, int]:
    """Run the whole path; returns the check's report and the checkpoint's bytes."""
    model, _ = run_recipe(load_recipe(RECIPES / recipe, overrides), lambda *status: None)
    save_checkpoint(model, folder / CHECKPOINT)
    export(folder / CHECKPOINT, ["all"], folder / "out")
    report = check(folder / "out")
    assert not report.exit_code, report.to_json()
    return report, (folder / CHECKPOINT).stat().st_size


def post_training(seed: int) -> float:
    """Top-1 of the digits network palettized without fine-tuning."""
    overrides = [f"seed={seed}", "dkm.epochs=0"]
    _, metrics = run_recipe(load_recipe(RECIPES / "digits.toml", overrides), lambda *status: None)
    assert metrics.hard is not None
    return metrics.hard


def sizes(report: Report, checkpoint: int) -> Iterable[Sequence[str]]:
    """A row per artifact: bytes, ratio, and the error and metric on each runtime that ran."""
    yield ("fp32 weights", f"{report.fp32_bytes:,}", "1.0x", "", "")
    yield ("checkpoint", f"{checkpoint:,}", f"{report.fp32_bytes / checkpoint:.1f}x", "", "")
    for artifact in report.artifacts:
        for runtime in report.runtimes:
            if runtime.target != artifact.target or runtime.status is Status.NOT_RUN:
                continue
            worst = max(fidelity.relative_l2 for fidelity in runtime.fidelity.values())
            yield (
                artifact.target,
                f"{artifact.bytes:,}",
                f"{report.fp32_bytes / artifact.bytes:.1f}x",
                f"{runtime.runtime} ({runtime.where})",
                f"{worst:.0e}",
            )


def copy(page: str, marker: str) -> str:
    """The table in a section of another benchmark's page."""
    lines = section(Path(__file__).with_name(page).read_text(), marker).splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def main() -> None:
    """Measure everything and rewrite README.md between its markers."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        digits = []
        for seed in SEEDS:
            (root / str(seed)).mkdir()
            digits.append(measure("digits.toml", root / str(seed), [f"seed={seed}"]))
            print(f"digits, seed {seed}: done", flush=True)
        without = [post_training(seed) for seed in SEEDS]
        (root / "mobilenet").mkdir()
        mobilenet = measure("mobilenet_v1_random.toml", root / "mobilenet", [])
    reports = [report for report, _ in digits]
    names = [run.runtime for run in reports[0].runtimes if run.status is not Status.NOT_RUN]
    rows: dict[str, list[float]] = {
        "PyTorch, fp32": [report.metrics["fp32"] for report in reports],
        "PyTorch, palettized without fine-tuning": without,
        "PyTorch, palettized with DKM": [report.metrics["hard"] for report in reports],
    }
    for name in names:
        metrics = [r.metric for report in reports for r in report.runtimes if r.runtime == name]
        rows[f"{name}, palettized with DKM"] = [metric for metric in metrics if metric is not None]
    header = ("top-1 %, 360 held-out images", *(f"seed {seed}" for seed in SEEDS), "mean")
    accuracy = table(
        header,
        [(name, *(f"{x:.2f}" for x in row), f"{mean(row):.2f}") for name, row in rows.items()],
    )
    header = ("", "bytes", "ratio", "runtime", "relative L2 to PyTorch")
    parts = {
        **{name: copy(*source) for name, source in COPIED.items()},
        "digits-accuracy": accuracy,
        "digits-sizes": table(header, sizes(*digits[0])),
        "mobilenet-sizes": table(header, sizes(*mobilenet)),
    }
    text = README.read_text()
    for marker, content in parts.items():
        text = replace_section(text, marker, content)
    README.write_text(text)


if __name__ == "__main__":
    main()
