"""A PyTorch module to a Core ML package with our palettes in it, untouched by any pass.

coremltools converts the dense weights; a pass of ours, ahead of all others, replaces each weight
that is a palette by ``constexpr_lut_to_dense``. No later pass folds anything into a constexpr.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import register_pass
from coremltools.optimize import _utils as ct_utils
from torch import nn
from torch.export import ExportedProgram

from dkm_export.errors import Unsupported
from dkm_export.palette import Palette
from dkm_export.palettized import InputSpec, ModelSource, PalettizedModel
from dkm_exporters.coreml.options import CoreMLOptions
from dkm_exporters.coreml.tracing import PROBABILITIES, constants, floating_outputs, trace
from dkm_exporters.mlprogram.emission import (
    REMOVED_PASSES,
    SUFFIXES,
    float_lut,
    ios18_shape,
    lut_to_dense,
)
from dkm_exporters.mlprogram.messages import model_warnings

_INSERT: Final = "dkm::insert_palettes"
_FORGET: Final = "dkm::forget_output_types"
_PRECISIONS: Final = {"fp16": ct.precision.FLOAT16, "fp32": ct.precision.FLOAT32}


def convert(
    model: PalettizedModel, module: nn.Module, path: Path, options: CoreMLOptions
) -> dict[str, str]:
    """Write ``module`` to ``path``, with every palette of ``model`` as a LUT and indices.

    Args:
        model: the palettes, and the names and shapes of inputs and outputs.
        module: computes the model with dense weights.
        path: of the ``.mlpackage``, which does not exist yet.
        options: of the target, which fit the model.

    Returns:
        The parameter's name by the name of the operation that decodes its palette.

    Raises:
        Unsupported: when the model cannot be traced or converted, or does not use a palette.
        InvalidInput: when the model returns other outputs than its source or the options say.
    """
    program = trace(model.source, module, options)
    parameters = constants(program, model, options)
    palettes = {name: model.palettes[parameter] for name, parameter in parameters.items()}
    try:
        _convert(program, model.source, palettes, path, options)
    except Exception as error:  # whatever an operator's converter or a pass runs into
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise Unsupported(f"coreml: coremltools cannot convert the model: {reason}") from error
    suffix = SUFFIXES[options.precision]
    return {f"{name}{suffix}": parameter for name, parameter in parameters.items()}


@register_pass(namespace="dkm")
class insert_palettes(AbstractGraphPass):  # type: ignore[misc]
    """Replace constants by ``constexpr_lut_to_dense``.

    Attributes:
        palettes: by name of the constant; an option of the pass, as is the next.
        options: of the target.
    """

    palettes: Mapping[str, Palette] = {}
    options = CoreMLOptions()

    def apply(self, prog: Any) -> None:
        block = prog.functions["main"]
        with block:
            for operation in list(block.operations):
                if operation.op_type == "const" and operation.name in self.palettes:
                    _replace(block, operation, self.palettes[operation.name], self.options)


@register_pass(namespace="dkm")
class forget_output_types(AbstractGraphPass):  # type: ignore[misc]
    """Drop the types of outputs, which other passes have made true by now.

    coremltools 9.0 would look up one for each output of a classifier, which has one more.
    """

    def apply(self, prog: Any) -> None:
        prog.functions["main"].output_types = None


def _replace(block: Any, constant: Any, palette: Palette, options: CoreMLOptions) -> None:
    if not np.array_equal(constant.outputs[0].val, palette.dense()):
        raise ValueError(f"constant '{constant.name}' is not the weight of its palette")
    layout = palette.layout
    place = {"name": constant.name, "before_op": constant}
    if options.deployment_target in ("iOS16", "iOS17"):
        decoded = mb.constexpr_lut_to_dense(
            indices=ct_utils.pack_elements_into_bits(palette.indices, palette.bits),
            lut=palette.lut.reshape(-1).astype(np.float32),
            shape=np.array(layout.shape, np.uint32),
            **place,
        )
    else:
        decoded = lut_to_dense(palette, _table(palette, constant, options), **place)
    block.replace_uses_of_var_after_op(
        anchor_op=constant, old_var=constant.outputs[0], new_var=decoded, force_replace=True
    )
    block.remove_ops([constant])


def _table(palette: Palette, constant: Any, options: CoreMLOptions) -> Any:
    """The LUT as iOS 18 has it; the float16 pass takes an int8 LUT's scale back exactly, too."""
    if options.lut == "float":
        return float_lut(palette)
    assert palette.int8_lut is not None
    steps, scale = palette.int8_lut
    shape = ios18_shape(palette)
    return mb.constexpr_blockwise_shift_scale(
        data=steps.reshape(shape),
        scale=scale.reshape(*shape[:-2], 1, 1).astype(np.float32),
        name=f"{constant.name}_lut",
        before_op=constant,
    )


def _convert(
    program: ExportedProgram,
    source: ModelSource,
    palettes: Mapping[str, Palette],
    path: Path,
    options: CoreMLOptions,
) -> None:
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.insert_pass(0, _INSERT)
    pipeline.set_options(_INSERT, {"palettes": palettes, "options": options})
    pipeline.append_pass(_FORGET)
    pipeline.remove_passes(REMOVED_PASSES)
    names, classifier = list(source.outputs), None
    if options.class_labels:
        names.append(PROBABILITIES)
        classifier = ct.ClassifierConfig(
            list(options.class_labels), predicted_probabilities_output=PROBABILITIES
        )
    with model_warnings("coreml"):
        ct.convert(
            program,
            inputs=[_input_type(spec, options) for spec in source.inputs],
            outputs=[
                ct.TensorType(name, dtype=np.float32 if floating else np.int32)
                for name, floating in zip(names, floating_outputs(program), strict=True)
            ],
            classifier_config=classifier,
            minimum_deployment_target=getattr(ct.target, options.deployment_target),
            compute_precision=_PRECISIONS[options.precision],
            compute_units=ct.ComputeUnit.CPU_ONLY,
            skip_model_load=True,
            package_dir=str(path),
            pass_pipeline=pipeline,
        )


def _input_type(spec: InputSpec, options: CoreMLOptions) -> Any:
    shape: Any = spec.shape
    if spec.name in options.enumerated_shapes:
        shape = ct.EnumeratedShapes(options.enumerated_shapes[spec.name], default=spec.shape)
    elif spec.name in options.shape_ranges:
        shape = tuple(
            ct.RangeDim(sizes[0], sizes[1], default=default) if len(sizes) > 1 else default
            for sizes, default in zip(options.sizes(spec), spec.shape, strict=True)
        )
    if spec.name in options.images:
        layout = ct.colorlayout[options.images[spec.name].color_layout]
        return ct.ImageType(spec.name, shape, color_layout=layout)
    return ct.TensorType(spec.name, shape, np.float32 if spec.high is None else np.int32)
