"""One checkpoint to any number of targets, all or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from dkm_export import __version__
from dkm_export.checkpoint import find_checkpoint, load_checkpoint
from dkm_export.errors import DkmError, GateFailed, InvalidInput, Unsupported
from dkm_export.exporting.exporter import Exporter
from dkm_export.files import CHECKPOINT, SAMPLES, staged
from dkm_export.manifest import Artifact, Contents, FileEntry, Manifest
from dkm_export.palette import Palette
from dkm_export.palettized import PalettizedModel
from dkm_export.plugins import EXPORTERS, discover, select
from dkm_export.quiet import quiet
from dkm_export.samples import make_samples, save_samples
from dkm_export.spec import Frozen
from dkm_export.validation import explain

_RECORDED = (
    *("torch", "numpy", "coremltools"),
    *("onnx", "onnx-ir", "onnxscript", "onnxruntime"),
    "executorch",
)
"""Packages whose versions decide an artifact's bytes, where they are installed."""


@dataclass(frozen=True)
class ExportPlan:
    """A checkpoint that every chosen target has agreed to hold."""

    checkpoint: Path
    model: PalettizedModel
    targets: Sequence[tuple[Exporter[Any], Frozen]]


def plan_export(
    checkpoint: Path,
    targets: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> ExportPlan:
    """Load the checkpoint and ask every target whether it can hold it, before any work.

    Args:
        checkpoint: a ``.dkm.safetensors`` file, or the folder of a run.
        targets: names of exporters; ``all`` means every one.
        settings: options by target, as text or JSON values.

    Raises:
        InvalidInput: when the checkpoint, a target's name or an option is wrong.
        Unsupported: when a target is not installed or cannot hold a layer.
    """
    chosen = choose_targets(targets, settings)
    file = find_checkpoint(checkpoint)
    model = load_checkpoint(file)
    for exporter, options in chosen:
        exporter.requires(model, options)
    return ExportPlan(file, model, chosen)


def choose_targets(
    targets: Sequence[str], settings: Mapping[str, Mapping[str, Any]] | None = None
) -> list[tuple[Exporter[Any], Frozen]]:
    """Exporters by name, with their options.

    Args:
        targets: names of exporters; ``all`` means every one.
        settings: options by target, as text or JSON values.

    Raises:
        InvalidInput: when a name or an option is wrong.
        Unsupported: when a target is not installed.
    """
    exporters: dict[str, Exporter[Any]] = discover(EXPORTERS)
    chosen = select(exporters, exporters if "all" in targets else targets, "target")
    for exporter in chosen:
        reason = exporter.unavailable()
        if reason:
            raise Unsupported(f"{exporter.target}: {reason}")
    settings = settings or {}
    names = [exporter.target for exporter in chosen]
    for target in settings.keys() - set(names):
        chosen_names = ", ".join(names) or "none"
        raise InvalidInput(f"option for '{target}', which is no chosen target: {chosen_names}")
    found = []
    for exporter in chosen:
        try:
            options = exporter.options.model_validate(settings.get(exporter.target, {}))
        except ValidationError as error:
            raise InvalidInput(f"{exporter.target}: {explain(error, exporter.options)}") from error
        found.append((exporter, options))
    return found


def export(
    checkpoint: Path,
    targets: Sequence[str],
    output: Path,
    *,
    force: bool = False,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    data: Mapping[str, Any] | None = MappingProxyType({}),
    progress: Callable[[str], None] = lambda message: None,
    verbose: bool = False,
) -> Manifest:
    """Write ``output`` with an artifact per target, the checkpoint, samples and the manifest.

    Every artifact is read back and its palettes compared with the checkpoint bit for bit.

    Args:
        checkpoint: a ``.dkm.safetensors`` file, or the folder of a run.
        targets: names of exporters; ``all`` means every one.
        output: folder to make.
        force: replace ``output`` when it exists.
        settings: options by target.
        data: arguments of the task that are others here than when the model was trained, such as
            where its data are; None makes random samples instead of the task's.
        progress: called with a line before each step that takes a while.
        verbose: let the libraries print what they want to.

    Raises:
        InvalidInput: when an input is wrong or ``output`` exists.
        Unsupported: when a target is not installed or cannot hold the model.
        GateFailed: when a palette in an artifact is not the checkpoint's.
    """
    plan = plan_export(checkpoint, targets, settings)
    with staged(output, force=force, folder=True, sources=[checkpoint]) as root:
        progress("pytorch: reference outputs")
        source = plan.model.source
        samples = make_samples(plan.model.build(), source, source.load_task(data))
        save_samples(samples, source, root / SAMPLES)
        shutil.copyfile(plan.checkpoint, root / CHECKPOINT)
        artifacts = []
        for exporter, options in plan.targets:
            progress(f"{exporter.target}: lowering")
            artifacts.append(_lower(exporter, options, plan.model, root, verbose))
        manifest = _manifest(plan.model, artifacts, root)
        manifest.write(root)
    return manifest


def _lower(
    exporter: Exporter[Any], options: Frozen, model: PalettizedModel, root: Path, verbose: bool
) -> Artifact:
    folder = root / exporter.target
    folder.mkdir()
    path = lower(exporter, options, model, folder, verbose=verbose)
    with quiet(enabled=not verbose):
        try:
            problems = palette_problems(model, exporter.read_palettes(path))
        except InvalidInput as error:
            problems = [f"the artifact cannot be read back: {error}"]
    if problems:
        raise GateFailed(f"{exporter.target}: {problems[0]}")
    files = exporter.files(path)
    return Artifact.of(exporter.target, path, files, root, options.model_dump(mode="json"))


def lower(
    exporter: Exporter[Any], options: Frozen, model: PalettizedModel, folder: Path, *, verbose: bool
) -> Path:
    """Write a target's artifact into ``folder``, which is empty, and return its path.

    Raises:
        Unsupported: when the target cannot express the model.
    """
    module = model.build()
    with quiet(enabled=not verbose):
        try:
            return exporter.lower(model, module, folder, options)
        except DkmError:
            raise
        except Exception as error:  # converters raise anything
            summary = str(error).strip().partition("\n")[0]
            raise Unsupported(
                f"{exporter.target}: cannot lower '{model.source.name}': "
                f"{type(error).__name__}: {summary} (-v shows all)"
            ) from error


def palette_problems(model: PalettizedModel, found: Mapping[str, Palette]) -> list[str]:
    """How palettes read from an artifact differ from the checkpoint's, a line per layer."""
    problems = []
    for name, palette in model.palettes.items():
        if name not in found:
            problems.append(f"{name}: its palette is not in the artifact")
        elif difference := palette.difference(found[name]):
            problems.append(f"{name}: {difference}")
    unknown = found.keys() - model.palettes.keys()
    problems += [f"{name}: a palette that the checkpoint does not have" for name in sorted(unknown)]
    return problems


def _manifest(model: PalettizedModel, artifacts: Sequence[Artifact], root: Path) -> Manifest:
    installed = {dist.name for dist in metadata.distributions()}
    return Manifest(
        tool_version=__version__,
        dependencies={name: metadata.version(name) for name in _RECORDED if name in installed},
        contents=Contents.of(model),
        checkpoint=FileEntry.of(root / CHECKPOINT, root),
        samples=FileEntry.of(root / SAMPLES, root),
        artifacts=tuple(artifacts),
    )
