"""Tests for a device, which an app's own tests run there: what `check` does here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dkm_export import __version__
from dkm_export.checking.check import choose, locate
from dkm_export.checking.metrics import LIMITS, Limits
from dkm_export.checking.runtime import NumericClass
from dkm_export.checkpoint import load_checkpoint
from dkm_export.errors import Unsupported
from dkm_export.files import DEVICE_TEST, staged
from dkm_export.quiet import quiet
from dkm_export.samples import load_samples


def make_device_tests(
    path: Path,
    runtimes: Sequence[str] = (),
    limits: Mapping[NumericClass, Limits] = LIMITS,
) -> dict[str, bytes]:
    """A test with samples, PyTorch's outputs and limits for each target that has one.

    Args:
        path: the folder of `dkm export`, or an artifact in it.
        runtimes: names of the runtimes to ask; all that fit the artifacts by default.
        limits: that the device is held to, by numeric class.

    Returns:
        Contents by path: ``<target>/<file>``, and what they belong to in ``device_test.json``.

    Raises:
        InvalidInput: when there is no export at ``path``, or it is malformed.
        Unsupported: when no runtime writes a test for these artifacts, or a sample does not fit.
    """
    root, manifest, artifacts = locate(path)
    paths = {artifact.target: root / artifact.path for artifact in artifacts}
    source = load_checkpoint(root / manifest.checkpoint.path).source
    samples = load_samples(root / manifest.samples.path, source)
    inputs = {name: tensor.numpy() for name, tensor in samples.inputs.items()}
    stacked = [tensor.numpy() for tensor in samples.outputs]
    outputs = dict(zip(source.outputs, stacked, strict=True))
    contents = {}
    for runtime in choose(artifacts, runtimes, ()):
        if runtime.target in paths:
            with quiet():
                files = runtime.device_test(paths[runtime.target], inputs, outputs, limits)
            contents.update({f"{runtime.target}/{name}": files[name] for name in files})
    if not contents:
        raise Unsupported(f"no runtime in use writes a device test for {', '.join(paths)}")
    origin = {
        "tool_version": __version__,
        "model": source.name,
        "checkpoint_sha256": manifest.checkpoint.sha256,
    }
    return contents | {DEVICE_TEST: json.dumps(origin, indent=2).encode() + b"\n"}


def write_device_tests(contents: Mapping[str, bytes], folder: Path, *, force: bool) -> None:
    """Write what `make_device_tests` gave, all or nothing.

    Raises:
        InvalidInput: when ``folder`` exists without ``force``, or is not one of these.
    """
    with staged(folder, force=force, folder=True) as place:
        for name, content in contents.items():
            file = place / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
