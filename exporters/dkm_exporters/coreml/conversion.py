"""A PyTorch module to a Core ML package with our palettes in it, untouched by any pass.

coremltools converts the dense weights; a pass of ours, ahead of all others, replaces each weight
that is a palette by ``constexpr_lut_to_dense``. No later pass folds anything into a constexpr.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import register_pass
from torch import Tensor, nn
from torch.export import ExportedProgram

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.palette import Palette
from dkm_export.palettized import ModelSource, PalettizedModel

Precision = Literal["fp16", "fp32"]

_PASS: Final = "dkm::insert_palettes"
_PRECISIONS: Final = {"fp16": ct.precision.FLOAT16, "fp32": ct.precision.FLOAT32}
_SUFFIXES: Final = {"fp16": "_cast_fp16", "fp32": ""}
"""What coremltools appends to the name of an operation that it casts to the precision."""


def convert(
    model: PalettizedModel, module: nn.Module, path: Path, precision: Precision
) -> dict[str, str]:
    """Write ``module`` to ``path``, with every palette of ``model`` as a LUT and indices.

    Args:
        model: the palettes, and the names and shapes of inputs and outputs.
        module: computes the model with dense weights.
        path: of the ``.mlpackage``, which does not exist yet.
        precision: of activations, LUTs and dense weights.

    Returns:
        The parameter's name by the name of the operation that decodes its palette.

    Raises:
        Unsupported: when the model cannot be traced or converted, or does not use a palette.
        InvalidInput: when the model returns another number of outputs than its source names.
    """
    program = _trace(model.source, module)
    parameters = _constants(program, model)
    palettes = {name: model.palettes[parameter] for name, parameter in parameters.items()}
    try:
        _convert(program, model.source, palettes, path, precision)
    except Exception as error:  # whatever an operator's converter or a pass runs into
        raise Unsupported(
            f"coreml: coremltools cannot convert the model: {_first_line(error)}"
        ) from error
    suffix = _SUFFIXES[precision]
    return {f"{name}{suffix}": parameter for name, parameter in parameters.items()}


@register_pass(namespace="dkm")
class insert_palettes(AbstractGraphPass):  # type: ignore[misc]
    """Replace constants by ``constexpr_lut_to_dense`` (opset of iOS 18, with vectors and groups).

    Attributes:
        palettes: by name of the constant; an option of the pass.
    """

    palettes: Mapping[str, Palette] = {}

    def apply(self, prog: Any) -> None:
        block = prog.functions["main"]
        with block:
            for operation in list(block.operations):
                if operation.op_type == "const" and operation.name in self.palettes:
                    _replace(block, operation, self.palettes[operation.name])


def _replace(block: Any, constant: Any, palette: Palette) -> None:
    if not np.array_equal(constant.outputs[0].val, palette.dense()):
        raise ValueError(f"constant '{constant.name}' is not the weight of its palette")
    layout = palette.layout
    inner = [1] * (len(layout.shape) - 1)
    table = palette.lut.reshape(layout.groups, *inner, 1 << palette.bits, layout.dim)
    index_type = types.nptype_from_builtin(types.string_to_builtin(f"uint{palette.bits}"))
    decoded = mb.constexpr_lut_to_dense(
        indices=palette.indices.astype(index_type),
        # The graph is float32 until the float16 pass, which takes the LUT back exactly.
        lut=table.astype(np.float32),
        # The form that coremltools itself writes: single values have no axis.
        vector_axis=np.int32(layout.axis) if layout.dim > 1 else None,
        name=constant.name,
        before_op=constant,
    )
    block.replace_uses_of_var_after_op(
        anchor_op=constant, old_var=constant.outputs[0], new_var=decoded, force_replace=True
    )
    block.remove_ops([constant])


def _trace(source: ModelSource, module: nn.Module) -> ExportedProgram:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: ExportedProgram = torch.export.export(
                module, source.example_inputs()
            ).run_decompositions(_DECOMPOSITIONS)
    except Exception as error:  # tracing runs the model's own code
        raise Unsupported(
            f"coreml: torch.export cannot trace the model: {_first_line(error)}"
        ) from error
    returned = len(program.graph_signature.user_outputs)
    if returned != len(source.outputs):
        raise InvalidInput(
            f"the model returns {returned} outputs and its source names {len(source.outputs)}: "
            f"{', '.join(source.outputs)}"
        )
    return program


def _gelu(x: Tensor, *, approximate: str = "none") -> Any:
    """Spell out the approximation, which coremltools overlooks here but finds by its pattern."""
    if approximate == "none":
        return NotImplemented
    return 0.5 * x * (torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))) + 1)


_DECOMPOSITIONS: Final = {torch.ops.aten.gelu.default: _gelu}


def _constants(program: ExportedProgram, model: PalettizedModel) -> dict[str, str]:
    """Palettized parameter by name of its constant, which is that of its placeholder."""
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    owners = {**{name: name for name in model.palettes}, **model.ties}
    constants = {
        constant: owners[parameter]
        for constant, parameter in program.graph_signature.inputs_to_parameters.items()
        if parameter in owners and constant in used
    }
    unused = sorted(model.palettes.keys() - set(constants.values()))
    if unused:
        raise Unsupported(
            f"coreml: {unused[0]}: the model does not use this weight directly: "
            "add a rule with skip = true"
        )
    return constants


def _convert(
    program: ExportedProgram,
    source: ModelSource,
    palettes: Mapping[str, Palette],
    path: Path,
    precision: Precision,
) -> None:
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.insert_pass(0, _PASS)
    pipeline.set_options(_PASS, {"palettes": palettes})
    # It merges LUTs that differ by less than 6e-8, as some float16 values and 0 and -0 do.
    pipeline.remove_passes({"common::const_deduplication"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ct.convert(
            program,
            inputs=[
                ct.TensorType(spec.name, spec.shape, np.float32 if spec.high is None else np.int32)
                for spec in source.inputs
            ],
            outputs=[
                ct.TensorType(name, dtype=np.float32 if floating else np.int32)
                for name, floating in zip(source.outputs, _floating(program), strict=True)
            ],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=_PRECISIONS[precision],
            compute_units=ct.ComputeUnit.CPU_ONLY,
            skip_model_load=True,
            package_dir=str(path),
            pass_pipeline=pipeline,
        )


def _floating(program: ExportedProgram) -> list[bool]:
    """For each output, whether it is floating point."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    outputs = (values[name] for name in program.graph_signature.user_outputs)
    return [isinstance(value, torch.Tensor) and value.is_floating_point() for value in outputs]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
