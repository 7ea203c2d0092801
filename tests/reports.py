"""Inputs of a report, made by hand: a run, its export, a check of it and a plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dkm_export.checking.metrics import LIMITS, compare
from dkm_export.checking.report import ArtifactReport, Finding, Report, RuntimeReport, Status
from dkm_export.checking.runtime import NumericClass
from dkm_export.checkpoint import load_checkpoint, save_checkpoint
from dkm_export.files import CHECKPOINT, METRICS
from dkm_export.manifest import Artifact, Contents, FileEntry, Manifest
from dkm_export.palettized import PalettizedModel
from dkm_export.planning.result import Plan
from dkm_export.sizing import account
from dkm_export.spec import LayerKind
from dkm_export.training.metrics import Epoch, Metrics, Sizes
from tests.zoo import CASES, palettize

REFERENCE = np.random.default_rng(0).normal(size=(8, 10)).astype(np.float32)


@dataclass(frozen=True)
class Inputs:
    """Where they are."""

    run: Path
    out: Path
    check: Path
    plan: Path

    @property
    def arguments(self) -> list[str]:
        """Of a ``dkm report`` with everything."""
        options = {"--run": self.run, "--check": self.check, "--plan": self.plan}
        return [str(self.out), *(str(x) for pair in options.items() for x in pair)]


def write_inputs(
    folder: Path,
    *,
    rename: Callable[[str], str] = lambda name: name,
    text: Callable[[str], str] = lambda text: text,
) -> Inputs:
    """Write consistent inputs below ``folder``.

    Args:
        folder: that exists.
        rename: makes the names of layers and tensors.
        text: makes every other text that a user or another program chooses.
    """
    model = _model(rename)
    run, out = folder / "run", folder / "out"
    run.mkdir()
    save_checkpoint(model, run / CHECKPOINT)
    metrics = _metrics(model, text)
    (run / METRICS).write_text(metrics.model_dump_json())
    manifest = _export(load_checkpoint(run / CHECKPOINT), out, text)
    report = _check(manifest, text)
    check, plan = folder / "check.json", folder / "plan.json"
    check.write_text(json.dumps(report.to_json()))
    planned = _plan(model, text).model_dump(mode="json")
    plan.write_text(json.dumps({"schema_version": 1, "plan": planned}))
    return Inputs(run, out, check, plan)


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the object in a JSON file."""
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def _model(rename: Callable[[str], str]) -> PalettizedModel:
    """Palettes with and without groups, of scalars and of vectors, and metrics."""
    factory, inputs, rules = CASES["wide"]
    model = palettize(f"tests.zoo:{factory}", inputs, *rules)
    return replace(
        model,
        palettes={rename(name): palette for name, palette in model.palettes.items()},
        dense={rename(name): tensor for name, tensor in model.dense.items()},
        metrics={"fp32": 91.5, "hard": 90.25},
    )


def _metrics(model: PalettizedModel, text: Callable[[str], str]) -> Metrics:
    curve = ((80.0, 70.0), (88.0, 85.5), (91.0, 90.25))
    epochs = tuple(
        Epoch(epoch=i, tau=0.5**i, loss=1 / i, soft=soft, hard=hard, gap=soft - hard)
        for i, (soft, hard) in enumerate(curve, 1)
    )
    sizes = Sizes(palettes=1, dense=1, fp32=model.fp32_bytes, account=account(model))
    return Metrics(
        seed=7, metric=text("top-1 %"), fp32=91.5, epochs=epochs, hard=90.25, sizes=sizes
    )


def _export(model: PalettizedModel, out: Path, text: Callable[[str], str]) -> Manifest:
    artifacts = []
    for target in ("coreml", "onnx"):
        file = out / target / f"a_b.{target}"
        file.parent.mkdir(parents=True)
        file.write_bytes(target.encode() * 2000)
        artifacts.append(Artifact.of(text(target), file, [file], out, {}))
    save_checkpoint(model, out / CHECKPOINT)
    (out / "samples.safetensors").write_bytes(b"samples")
    manifest = Manifest(
        tool_version=text("0.1"),
        dependencies={text("onnx"): text("1.2")},
        contents=Contents.of(model),
        checkpoint=FileEntry.of(out / CHECKPOINT, out),
        samples=FileEntry.of(out / "samples.safetensors", out),
        artifacts=tuple(artifacts),
    )
    manifest.write(out)
    return manifest


def _check(manifest: Manifest, text: Callable[[str], str]) -> Report:
    """One runtime passes, one fails, one crashes and two did not run."""

    def runtime(artifact: int, name: str, where: str, status: Status, **more: Any) -> RuntimeReport:
        finding = Finding(check="run", status=status, message=text(f"{name} says so"))
        target = manifest.artifacts[artifact].target
        fields = {"runtime": text(name), "target": target, "where": text(where), **more}
        return RuntimeReport(findings=(finding,), **fields)

    fp32, fp16 = LIMITS[NumericClass.FP32], LIMITS[NumericClass.FP16]
    exact = {text("logits"): compare(REFERENCE, REFERENCE, fp32)}
    close = {text("logits"): compare(REFERENCE, REFERENCE * np.float32(1.0001), fp16)}
    broken = {text("logits"): compare(REFERENCE, REFERENCE * np.nan, fp32)}
    passing = {"numeric_class": "fp32", "limits": fp32, "version": text("onnxruntime 1.2")}
    runtimes = (
        runtime(0, "coreml", "Core ML on a Mac", Status.NOT_RUN),
        runtime(0, "coreml-gpu", "Core ML on a Mac, GPU", Status.NOT_RUN),
        runtime(
            0,
            "coreml-reference",
            "interpreted with torch on CPU",
            Status.PASS,
            numeric_class="fp16",
            limits=fp16,
            fidelity=close,
            metric=90.2,
        ),
        runtime(1, "onnxruntime", "native CPU", Status.PASS, fidelity=exact, **passing),
        runtime(
            1, "onnxruntime-aarch64", "aarch64, emulated", Status.FAIL, fidelity=broken, **passing
        ),
        runtime(1, "onnxruntime-web", "wasm under node", Status.ERROR),
    )
    structure = Finding(check="structure", status=Status.PASS, message=text("5 palettes"))
    return Report(
        name=manifest.contents.name,
        versions={"dkm-export": manifest.tool_version} | manifest.dependencies,
        checked_with={text("torch"): text("2")},
        machine=text("Linux x86_64"),
        checkpoint_sha256=manifest.checkpoint.sha256,
        fp32_bytes=manifest.contents.fp32_bytes,
        metric_name=text("top-1 %"),
        metrics={"fp32": 91.5, "hard": 90.25},
        max_drop=None,
        reference=(structure,),
        artifacts=tuple(
            ArtifactReport(
                target=artifact.target,
                path=artifact.path,
                bytes=artifact.bytes,
                files=artifact.files,
                findings=(structure,),
                notes=(text("ship it"),),
            )
            for artifact in manifest.artifacts
        ),
        runtimes=runtimes,
        required=(),
        selected=(),
    )


def _plan(model: PalettizedModel, text: Callable[[str], str]) -> Plan:
    """A plan that the checkpoint follows in all layers but the first."""
    layers = [
        {
            "name": name,
            "kind": LayerKind.CONV,
            "shape": palette.layout.shape,
            "bits": palette.bits,
            "dim": palette.layout.dim,
            "groups": palette.layout.groups,
            "bytes": palette.nbytes,
            "error": 0.001,
        }
        for name, palette in model.palettes.items()
    ]
    layers[0]["bits"] = 1
    size = sum(palette.nbytes for palette in model.palettes.values())
    uniform = [
        (name, size * part, error) for name, part, error in (("1/1", 1, 0.5), ("4/1", 2, 0.02))
    ]
    return Plan.model_validate(
        {
            "model": model.source.name,
            "calibration": text("256 inputs"),
            "budget": text("9 kB"),
            "limit": 9000,
            "bytes": {"checkpoint": 8000},
            "error": 0.03,
            "bound": 0.02,
            "layers": layers,
            "front": [{"bytes": size * i, "error": 0.03 / i**3} for i in range(1, 6)],
            "uniform": [{"bytes": b, "error": e, "name": text(n)} for n, b, e in uniform],
        }
    )
