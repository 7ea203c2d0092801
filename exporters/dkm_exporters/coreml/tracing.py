"""A PyTorch module as the ``torch.export`` program that coremltools converts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.palettized import InputSpec, ModelSource, PalettizedModel
from dkm_exporters.coreml.options import CoreMLOptions, ImageInput

PROBABILITIES: Final = "dkm_probabilities"
"""What a classifier's last output is called, before it becomes the labels' dictionary."""


class _Program(nn.Module):
    """The model as an app calls it: from images, and with probabilities where it classifies."""

    def __init__(self, model: nn.Module, source: ModelSource, options: CoreMLOptions) -> None:
        super().__init__()
        self.model = model
        self._images = [options.images.get(spec.name) for spec in source.inputs]
        self._classifies, self._softmax = bool(options.class_labels), options.softmax

    def forward(self, *inputs: Tensor) -> Any:
        given = [
            x if image is None else _from_pixels(x, image)
            for x, image in zip(inputs, self._images, strict=True)
        ]
        outputs = self.model(*given)
        if not self._classifies:
            return outputs
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        probabilities = outputs[0].softmax(-1) if self._softmax else outputs[0].clone()
        return *outputs, probabilities


def trace(source: ModelSource, module: nn.Module, options: CoreMLOptions) -> ExportedProgram:
    """Trace ``module`` in eval mode.

    Raises:
        Unsupported: when the model cannot be traced, or not with shapes that vary.
        InvalidInput: when it returns another number of outputs than its source names, or the
            class labels are not as many as the first output has values.
    """
    inputs = [_example(spec, options) for spec in source.inputs]
    flexible = [
        {axis: Dim.AUTO for axis, sizes in enumerate(options.sizes(spec)) if len(sizes) > 1}
        for spec in source.inputs
    ]
    dynamic: Any = tuple(flexible)
    if _is_wrapped(options):
        module, dynamic = _Program(module, source, options).eval(), (dynamic,)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported: ExportedProgram = torch.export.export(
                module, tuple(inputs), dynamic_shapes=dynamic
            ).run_decompositions(_DECOMPOSITIONS)
    except Exception as error:  # tracing runs the model's own code
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise Unsupported(f"coreml: torch.export cannot trace the model: {reason}") from error
    _require_flexible(exported, source, flexible)
    _require_outputs(exported, source, options)
    return exported


def constants(
    program: ExportedProgram, model: PalettizedModel, options: CoreMLOptions
) -> dict[str, str]:
    """Palettized parameter by name of its constant, which is that of its placeholder.

    Raises:
        Unsupported: when the program does not use a palette.
    """
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    owners = {**{name: name for name in model.palettes}, **model.ties}
    parameters = program.graph_signature.inputs_to_parameters
    prefix = "model." if _is_wrapped(options) else ""
    found = {
        constant: owners[parameter]
        for constant, traced in parameters.items()
        if (parameter := traced.removeprefix(prefix)) in owners and constant in used
    }
    unused = sorted(model.palettes.keys() - set(found.values()))
    if unused:
        raise Unsupported(
            f"coreml: {unused[0]}: the model does not use this weight directly: "
            "add a rule with skip = true"
        )
    return found


def floating_outputs(program: ExportedProgram) -> list[bool]:
    """For each output, whether it is floating point."""
    return [isinstance(value, Tensor) and value.is_floating_point() for value in _outputs(program)]


def _is_wrapped(options: CoreMLOptions) -> bool:
    """Whether there is a `_Program` around the model, and so a prefix before its parameters."""
    return bool(options.images or options.class_labels)


def _from_pixels(x: Tensor, image: ImageInput) -> Tensor:
    scale, bias = (
        torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1)
        for value in (image.scale, image.bias)
    )
    return x * scale + bias


def _example(spec: InputSpec, options: CoreMLOptions) -> Tensor:
    """An input of a shape that torch.export keeps general: it takes a size of 1 for fixed."""
    sizes = options.sizes(spec)
    shape = tuple(
        max(default, min(2, max(allowed)))
        for default, allowed in zip(spec.shape, sizes, strict=True)
    )
    return spec.model_copy(update={"shape": shape}).random(torch.Generator().manual_seed(0))


def _require_flexible(
    program: ExportedProgram, source: ModelSource, flexible: list[dict[int, Any]]
) -> None:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    names = program.graph_signature.user_inputs
    for spec, name, axes in zip(source.inputs, names, flexible, strict=True):
        for axis in axes:
            if isinstance(values[name].shape[axis], int):
                raise Unsupported(
                    f"coreml: the model fixes axis {axis} of '{spec.name}' to "
                    f"{values[name].shape[axis]}: leave it fixed, or change the model's code"
                )


def _require_outputs(program: ExportedProgram, source: ModelSource, options: CoreMLOptions) -> None:
    values = _outputs(program)
    returned = len(values) - bool(options.class_labels)
    if returned != len(source.outputs):
        raise InvalidInput(
            f"the model returns {returned} outputs and its source names {len(source.outputs)}: "
            f"{', '.join(source.outputs)}"
        )
    if options.class_labels:
        shape, count = list(values[0].shape), len(options.class_labels)
        if shape != [1, count]:
            raise InvalidInput(
                f"coreml: class_labels: output '{source.outputs[0]}' has shape {shape}, "
                f"{count} labels need [1, {count}]"
            )


def _outputs(program: ExportedProgram) -> list[Any]:
    values: Mapping[str, Any] = {node.name: node.meta.get("val") for node in program.graph.nodes}
    return [values[name] for name in program.graph_signature.user_outputs]


def _gelu(x: Tensor, *, approximate: str = "none") -> Any:
    """Spell out the approximation, which coremltools overlooks here but finds by its pattern."""
    if approximate == "none":
        return NotImplemented
    return 0.5 * x * (torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))) + 1)


_RECURRENT: Final = [torch.ops.aten.lstm.input, torch.ops.aten.gru.input]
"""Operators that coremltools does not know as torch.export has them."""

_DECOMPOSITIONS: Final = {
    torch.ops.aten.gelu.default: _gelu,
    **torch._decomp.get_decompositions(_RECURRENT),
}
