"""Our ONNX files in several versions of ONNX Runtime: ``python benchmarks/onnx_versions.py``.

Exports palettes of every kind once, makes a virtual environment for each version, and compares
what it computes with PyTorch. Writes benchmarks/onnx_versions.md, and exits with 1 when a file
fails. A version that pip cannot get is not run, and the page says so. ``--quick`` is a smoke run
with few files, which writes nothing. Takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from benchmarks.measuring import machine, run_in_turn, save_samples, table, write_report
from benchmarks.onnx_sessions import LIMIT, LIMIT_SINCE, errors_of
from dkm_export import (
    CompressionSpec,
    InputSpec,
    LayerRule,
    ModelSource,
    PalettizedModel,
)
from dkm_export.checking.runtime import Runtime
from dkm_export.errors import DkmError
from dkm_export.palette import Layout, Palette
from dkm_export.plugins import RUNTIMES, discover
from dkm_export.quiet import quiet
from dkm_exporters.onnx import OnnxExporter, OnnxOptions
from tests.networks import palettized

REPORT = Path(__file__).with_suffix(".md")
WORKER = str(Path(__file__).with_name("onnx_sessions.py"))
CACHE = Path(__file__).parents[1] / "build" / "onnx_versions"

INTRODUCTION = f"""# Versions of ONNX Runtime

`python benchmarks/onnx_versions.py` wrote this page. The same files, exported once, run in each
version, in an environment with nothing but numpy and that onnxruntime. There is a file for each
number of bits from 1 to 8, with a layer of its own, and an output, for each of these: dim 1, 2, 4
and 8; one group and four; Conv1d, Conv2d, Conv3d, grouped and depthwise convolution,
ConvTranspose2d, Linear, Embedding, and an Embedding tied with a Linear. Palettes are random. Three
whole networks come on top, small and with random weights: MobileNet-v1, BERT as MiniLM is one, and
a vision transformer. Each file is there with its decoders inlined and as functions
(`functions = true`).

Sessions: `default` decodes all weights at load, but for embeddings, whose rows are decoded where
they are looked up, and for functions in 1.16, which inlines them too late; 1.17 does it in time.
`packed` decodes none, by the session entry
`{LIMIT}` from version
{".".join(map(str, LIMIT_SINCE))} on, and before, where it is unknown, by
`disabled_optimizers=["ConstantFolding"]`. `unoptimized` is `ORT_DISABLE_ALL`.

Error: the worst relative L2 to PyTorch of an output, over two inputs; a file runs when none is
above 1e-5. Loaded: bytes of the model as the session runs it, to those of the file, over all files:
about 1.0x where weights stay packed, and up to 2x where functions became operators as well.
"""

VERSIONS = ("1.16.3", "1.20.1")
"""Beside the installed one."""

NUMPY = {"1.16.3": "numpy<2"}
"""What a version needs other than the newest numpy."""

FORMS = ("inlined", "functions")
"""Of the decoders: names of the folders."""

SETTINGS = ("default", "packed", "unoptimized")
ELSEWHERE = ("onnxruntime-web", "onnxruntime-node")
"""Runtimes that are no Python package, and have their own default session."""

LARGEST_ERROR = 1e-5
SAMPLES = 2
NETWORKS = ("mobilenet_v1", "minilm", "vit")
"""Keys of `tests.networks.FAMILIES`."""

DIMS, GROUPS = (1, 2, 4, 8), (1, 4)
INPUTS = {
    "line": InputSpec(name="line", shape=(1, 32, 12)),
    "image": InputSpec(name="image", shape=(1, 32, 6, 6)),
    "volume": InputSpec(name="volume", shape=(1, 16, 4, 4, 4)),
    "row": InputSpec(name="row", shape=(1, 128)),
    "tokens": InputSpec(name="tokens", shape=(1, 9), dtype="int32", high=256),
}


class Tied(nn.Module):
    """An embedding and the layer that turns vectors into tokens again, with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.head = nn.Linear(32, 256, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.embedding(tokens))
        return y


KINDS: Mapping[str, tuple[str, Callable[[], nn.Module]]] = {
    "conv1d": ("line", lambda: nn.Conv1d(32, 64, 3)),
    "conv2d": ("image", lambda: nn.Conv2d(32, 64, 3)),
    "conv3d": ("volume", lambda: nn.Conv3d(16, 32, 3)),
    "grouped": ("image", lambda: nn.Conv2d(32, 64, 3, groups=4)),
    "depthwise": ("image", lambda: nn.Conv2d(32, 64, 3, groups=32)),
    "transposed": ("image", lambda: nn.ConvTranspose2d(32, 16, 3, 2)),
    "linear": ("row", lambda: nn.Linear(128, 256)),
    # something has to follow: what is an output itself is not looked up by rows
    "embedding": ("tokens", lambda: nn.Sequential(nn.Embedding(256, 64), nn.Tanh())),
    "tied": ("tokens", Tied),
}
"""By name: the input, and what makes the layer."""

WEIGHTS = {"embedding": "0.weight", "tied": "embedding.weight"}
"""By kind: the name of its weight, where it is another than ``weight``."""


class Gallery(nn.Module):
    """A layer of each kind for each dim and number of groups, all side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: KINDS[kind][1]() for name, kind, _, _ in _members()})

    def forward(
        self, line: Tensor, image: Tensor, volume: Tensor, row: Tensor, tokens: Tensor
    ) -> tuple[Tensor, ...]:
        inputs = {"line": line, "image": image, "volume": volume, "row": row, "tokens": tokens}
        return tuple(self.layers[name](inputs[KINDS[kind][0]]) for name, kind, _, _ in _members())


def _members() -> Iterator[tuple[str, str, int, int]]:
    """Name, kind, dim and groups of each layer of the gallery."""
    for kind, dim, groups in itertools.product(KINDS, DIMS, GROUPS):
        yield f"{kind}_{dim}_{groups}", kind, dim, groups


def gallery(bits: int) -> PalettizedModel:
    """The gallery with random palettes."""
    torch.manual_seed(bits)
    generator = np.random.default_rng(bits)
    module = Gallery()
    state = module.state_dict()
    palettes, ties = {}, {}
    for name, kind, dim, groups in _members():
        weight = f"layers.{name}.{WEIGHTS.get(kind, 'weight')}"
        if kind == "tied":
            ties[f"layers.{name}.head.weight"] = weight
        layout = Layout(tuple(state[weight].shape), dim=dim, groups=groups)
        lut = generator.normal(size=(groups, 1 << bits, dim)).astype(np.float16)
        indices = generator.integers(0, 1 << bits, layout.index_shape, dtype=np.uint8)
        palettes[weight] = Palette(bits, layout, lut, indices)
    source = ModelSource(
        name=f"bits{bits}",
        factory="benchmarks.onnx_versions:Gallery",
        inputs=tuple(INPUTS.values()),
        outputs=tuple(name for name, *_ in _members()),
    )
    dense = {name: state[name] for name in state.keys() - palettes.keys() - ties.keys()}
    spec = CompressionSpec(rules=(LayerRule(bits=bits),))
    return PalettizedModel(source, spec, palettes, dict(sorted(dense.items())), ties=ties)


def export(models: Sequence[PalettizedModel], folder: Path) -> dict[str, str]:
    """Samples by file: each model, inlined and as functions, and what PyTorch computes."""
    files = {}
    for model in models:
        started = time.perf_counter()
        source = model.source
        samples = folder / f"{source.name}.npz"
        generator = torch.Generator().manual_seed(1)
        inputs = [tuple(spec.random(generator) for spec in source.inputs) for _ in range(SAMPLES)]
        save_samples(model.build(), source, inputs, samples)
        for form in FORMS:
            into = folder / form
            into.mkdir(exist_ok=True)
            options = OnnxOptions(functions=form == "functions")
            with quiet():
                file = OnnxExporter().lower(model, model.build(), into, options)
            files[str(file)] = str(samples)
        took = time.perf_counter() - started
        print(f"{source.name}: exported twice, {took:.0f} s", file=sys.stderr)
    return files


class Job(BaseModel):
    """What `onnx_sessions.check` is to do."""

    files: Mapping[str, str]
    setting: str
    decode: int = 1


class Found(BaseModel):
    """What it found, by file: errors by output, why it failed, growth of the model at load."""

    errors: dict[str, dict[str, float]]
    failures: dict[str, str]
    growth: dict[str, float]


@dataclass(frozen=True)
class Row:
    """A line of the report, and what is wrong with files."""

    cells: tuple[str, ...]
    problems: tuple[str, ...] = ()


def environment(version: str) -> str:
    """The Python of an environment with that version, from the cache if it is there.

    Raises:
        subprocess.CalledProcessError: when there is no such wheel, or no network.
    """
    folder = CACHE / version
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"onnxruntime {version}: installing", file=sys.stderr)
        packages = [f"onnxruntime=={version}", NUMPY.get(version, "numpy")]
        python = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        for command in ([sys.executable, "-m", "venv", str(folder)], [*python, *packages]):
            subprocess.run(command, check=True, capture_output=True, text=True)
        (folder / "complete").touch()
    return str(folder / "bin" / "python")


def in_version(version: str, python: str, files: Mapping[str, str]) -> list[Row]:
    """A row for each form of the decoders and setting."""
    jobs = {
        f"{version}, {form}, {setting}": Job(files=_of_form(files, form), setting=setting)
        for form, setting in itertools.product(FORMS, SETTINGS)
    }
    found, failures = run_in_turn(WORKER, jobs, Found, 1, python, echo=False)
    rows = [_row(name, len(jobs[name].files), *found[name]) for name in found]
    return rows + [Row(_cells(name, why), (f"{name}: {why}",)) for name, why in failures.items()]


def _of_form(files: Mapping[str, str], form: str) -> dict[str, str]:
    return {file: files[file] for file in files if Path(file).parent.name == form}


def _row(name: str, count: int, found: Found) -> Row:
    problems = [f"{name}: {_short(file)}: {why}" for file, why in found.failures.items()]
    for file, errors in found.errors.items():
        wrong = {output: error for output, error in errors.items() if error > LARGEST_ERROR}
        if wrong:
            worst = max(wrong, key=lambda output: wrong[output])
            problems.append(
                f"{name}: {_short(file)}: {len(wrong)} outputs are wrong, {worst} by {wrong[worst]}"
            )
    worst_error = max((max(errors.values()) for errors in found.errors.values()), default=0.0)
    growth = found.growth.values()
    span = f"{min(growth):.1f}x to {max(growth):.1f}x" if growth else ""
    ran = f"{count - len(problems)} of {count}"
    return Row(_cells(name, ran, f"{worst_error:.0e}", span), tuple(problems))


def elsewhere(name: str, files: Mapping[str, str]) -> list[Row]:
    """The files in a runtime that is no Python package: a row for each form of the decoders."""
    runtime: Runtime | None = discover(RUNTIMES).get(name)
    reason = "no such runtime is installed" if runtime is None else runtime.unavailable()
    if runtime is None or reason:
        return [Row(_cells(name, f"not run: {reason}"))]
    rows = []
    for form in FORMS:
        found = Found(errors={}, failures={}, growth={})
        chosen = _of_form(files, form)
        for file, samples in chosen.items():
            print(f"  {name}: {_short(file)}", file=sys.stderr)
            try:
                found.errors[file] = errors_of(runtime.load(Path(file)).run, samples)
            except DkmError as error:
                found.failures[file] = str(error)
        rows.append(_row(f"{name}, {form}, default", len(chosen), found))
    return rows


def _cells(name: str, ran: str, error: str = "", growth: str = "") -> tuple[str, ...]:
    version, form, setting = (*name.split(", "), "", "")[:3]
    return version, form, setting, ran, error, growth


def _short(file: str) -> str:
    return "/".join(Path(file).parts[-2:])


def main() -> int:
    """Run everything everywhere and write the report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smoke run: three bits, one network")
    options = parser.parse_args()
    all_bits, names = ((1, 3, 8), NETWORKS[-1:]) if options.quick else (range(1, 9), NETWORKS)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        models = [*(gallery(bits) for bits in all_bits), *(palettized(name, 4) for name in names)]
        files = export(models, Path(folder))
        for version in VERSIONS:
            try:
                rows += in_version(version, environment(version), files)
            except subprocess.CalledProcessError as error:
                why = (error.stderr.strip() or str(error)).splitlines()[-1]
                rows.append(Row(_cells(version, f"not run: {why}")))
        rows += in_version(metadata.version("onnxruntime"), sys.executable, files)
        for name in ELSEWHERE:
            rows += elsewhere(name, files)
    header = ("ONNX Runtime", "decoders", "session", "files that run", "error", "loaded")
    facts = machine(torch.device("cpu"), ("onnx", "onnxscript"))
    content = f"{facts}\n\n{table(header, [row.cells for row in rows])}"
    print(content)
    if not options.quick:
        write_report(REPORT, INTRODUCTION, "versions", content)
    problems = [problem for row in rows for problem in row.problems]
    for problem in problems:
        print(f"failed: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
