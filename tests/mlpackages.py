"""Core ML packages for tests: made by coremltools alone, edited, and run by the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from dkm_export.checking.runtime import Runtime
from dkm_runtimes.coreml_reference import CoreMLReferenceRuntime

MODEL = "Data/com.apple.CoreML/model.mlmodel"


def save(model: Any, folder: Path) -> Path:
    """Where a model of coremltools then is."""
    path = folder / "theirs.mlpackage"
    model.save(str(path))
    return path


def program(
    build: Callable[..., Any], inputs: tuple[Tensor, ...], folder: Path, target: str = "iOS18"
) -> Path:
    """A program that is written down in MIL, in float32; ``build`` takes what ``inputs`` are."""
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    version = getattr(ct.target, target)
    specs = [
        mb.TensorSpec(tuple(x.shape), types.int32 if x.dtype == torch.int32 else types.fp32)
        for x in inputs
    ]
    function = mb.program(input_specs=specs, opset_version=version)(build)
    model = ct.convert(
        function,
        minimum_deployment_target=version,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
        pass_pipeline=ct.PassPipeline.EMPTY,
    )
    return save(model, folder)


def kinds(artifact: Path) -> list[str]:
    """The operators of a package, in order."""
    from dkm_exporters.mlprogram.package import Package

    return [operation.kind for operation in Package(artifact).operations]


def outputs(artifact: Path) -> list[str]:
    """The names of a package's outputs, in the order in which the reference gives them."""
    from dkm_exporters.mlprogram.package import Package

    return Package(artifact).outputs


def run(
    artifact: Path, inputs: tuple[Tensor, ...], runtime: Runtime | None = None
) -> list[npt.NDArray[Any]]:
    """Outputs for inputs in the order of the program's."""
    from dkm_exporters.mlprogram.package import Package

    arrays = {name: x.numpy() for name, x in zip(Package(artifact).inputs, inputs, strict=True)}
    return (runtime or CoreMLReferenceRuntime()).load(artifact).run(arrays)


def edit_model(artifact: Path, edit: Callable[[Any], None]) -> None:
    """Change the model file of a package in place; ``edit`` gets the ``Model``."""
    from coremltools.proto import Model_pb2

    file = artifact / MODEL
    spec = Model_pb2.Model.FromString(file.read_bytes())
    edit(spec)
    file.write_bytes(spec.SerializeToString())


def operations(spec: Any) -> list[Any]:
    """Those of the main function."""
    function = spec.mlProgram.functions["main"]
    return list(function.block_specializations[function.opset].operations)


def input_ranges(artifact: Path) -> list[tuple[int, int]]:
    """The least and the largest size of each axis of the first input."""
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model.FromString((artifact / MODEL).read_bytes())
    sizes = spec.description.input[0].type.multiArrayType.shapeRange.sizeRanges
    return [(size.lowerBound, size.upperBound) for size in sizes]
