"""From a torch module to an ONNX graph that is clean, but whose weights are still dense."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Final

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass
from onnxscript.optimizer import fold_constants
from onnxscript.version_converter import ConvertVersionPass
from torch import Tensor, nn
from torch.export import Dim

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.palettized import InputSpec, ModelSource
from dkm_exporters.onnx.options import OnnxOptions

_OWN_OPSET: Final = 18
"""The oldest that torch writes by itself."""

_FUNCTIONS_FROM: Final = 8
"""IR version that brought model-local functions. ONNX Runtime 1.16 takes up to version 9."""

_SIZE = re.compile(r"\bs\d+\b")
"""What torch calls a size that it does not know, in expressions too."""

_OPERATOR = re.compile(r"call_function\[target=torch\.ops\.([\w.]+)\]")


def example_inputs(source: ModelSource, options: OnnxOptions) -> tuple[Tensor, ...]:
    """Inputs to trace with: where the app chooses a size it is at least 2, as 1 means fixed."""
    generator = torch.Generator().manual_seed(0)
    return tuple(_example(spec, options, generator) for spec in source.inputs)


def trace(
    module: nn.Module, inputs: tuple[Tensor, ...], source: ModelSource, options: OnnxOptions
) -> ir.Model:
    """Export ``module``; weights keep their parameter names, inputs and outputs take the source's.

    Nothing is fused, and only constants of the code are folded: with all that torch's optimizer
    does, weights are renamed, transposed and merged, and no palette could be found again.

    Raises:
        Unsupported: when ONNX, or the chosen opset, has no equivalent of an operator, or the model
            fixes the size of an axis that is to be dynamic.
        InvalidInput: when the module returns another number of outputs than the source names.
    """
    axes = [
        dict.fromkeys(options.dynamic_axes.get(spec.name, {}), Dim.AUTO) for spec in source.inputs
    ]
    try:
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            optimize=False,
            opset_version=max(options.opset, _OWN_OPSET),
            verbose=False,
            dynamic_shapes=tuple(axes) if any(axes) else None,
        )
    except torch.onnx.OnnxExporterError as error:
        raise Unsupported(f"onnx: {_explain(error)}") from error
    assert program is not None
    model = program.model
    ranges = program.exported_program.range_constraints if program.exported_program else {}
    fixed = {str(size): int(r.lower) for size, r in ranges.items() if r.lower == r.upper}
    _name_axes(model.graph, source, options, fixed)
    model.graph.name = source.name
    ShapeInferencePass()(model)
    _remove_casts(model.graph)
    fold_constants(model, onnx_shape_inference=False, should_fold=_takes_constants)
    _order_gelu(model.graph)
    RemoveUnusedNodesPass()(model)
    _name_nodes(model.graph)
    _strip(model)
    _name_ends(model.graph, source)
    if options.opset < _OWN_OPSET:
        _convert_down(model, options.opset)
    own = [onnx.helper.make_opsetid("", options.opset)]
    model.ir_version = max(_FUNCTIONS_FROM, onnx.helper.find_min_ir_version_for(own))
    return model


def _example(spec: InputSpec, options: OnnxOptions, generator: torch.Generator) -> Tensor:
    dynamic = options.dynamic_axes.get(spec.name, {})
    shape = [max(size, 2) if axis in dynamic else size for axis, size in enumerate(spec.shape)]
    return spec.model_copy(update={"shape": tuple(shape)}).random(generator)


def _name_axes(
    graph: ir.Graph, source: ModelSource, options: OnnxOptions, fixed: Mapping[str, int]
) -> None:
    """Call dynamic axes as the options do, instead of torch's ``s31``, wherever they occur.

    ``fixed`` has the sizes that torch calls by a name although they can be no other ones.
    """
    names: dict[str, str] = {}
    for value, spec in zip(graph.inputs, source.inputs, strict=True):
        for axis, name in options.dynamic_axes.get(spec.name, {}).items():
            assert value.shape is not None
            size = value.shape[axis]
            if isinstance(size, int) or str(size) in fixed:
                raise Unsupported(
                    f"onnx: the model fixes axis {axis} of '{spec.name}' to "
                    f"{fixed.get(str(size), size)}: leave it out of dynamic_axes, or change the "
                    "model's code"
                )
            if names.setdefault(str(size), name) != name:
                raise Unsupported(
                    f"onnx: in the model '{names[str(size)]}' and '{name}' of dynamic_axes are "
                    "always of the same size: give them the same name"
                )
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    size
                    if isinstance(size, int)
                    else _SIZE.sub(lambda found: names.get(found[0], found[0]), str(size))
                    for size in value.shape
                ]
            )


def _takes_constants(node: ir.Node) -> bool:
    """Whether ``node`` computes from numbers of the model's code alone."""
    producers = [value.producer() for value in node.inputs if value is not None]
    return all(before is not None and before.op_type == "Constant" for before in producers)


def _convert_down(model: ir.Model, opset: int) -> None:
    for node in model.graph.all_nodes():
        since = [
            s.since_version
            for s in onnx.defs.get_all_schemas_with_history()
            if s.name == node.op_type and s.domain == node.domain
        ]
        if min(since) > opset:
            raise Unsupported(
                f"onnx: opset {opset} has no {node.op_type} ({node.name}): "
                f"set opset to {min(since)} or more"
            )
        # The converter would leave it behind where the older operator has no such attribute.
        if node.attributes.get_int("noop_with_empty_axes", 1) == 0:
            node.attributes.pop("noop_with_empty_axes")
    ConvertVersionPass(opset, fallback=True)(model)
    if model.graph.opset_imports[""] != opset:
        raise Unsupported(
            f"onnx: the model's operators cannot be written in opset {opset}: "
            f"leave opset at {_OWN_OPSET}, or a later one"
        )


def _explain(error: Exception) -> str:
    """The operator and the innermost cause; torch's own message is a page of advice."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    operator = next((found[1] for cause in causes if (found := _OPERATOR.search(str(cause)))), None)
    reason = (str(causes[-1]).strip() or type(causes[-1]).__name__).splitlines()[0]
    return f"{operator or 'the model'} cannot be exported: {reason}; rewrite that part of the model"


def _name_nodes(graph: ir.Graph) -> None:
    """Name nodes after the module that they come from: ``features.0.0/Conv``."""
    for node in graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        module = scopes[-2] if len(scopes) > 1 else ""
        node.name = f"{module}/{node.op_type}".lstrip("/")


def _strip(model: ir.Model) -> None:
    """Remove torch's notes for debugging: stack traces with paths, signatures, FX nodes."""
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            node.metadata_props.clear()
            values += node.outputs
        for value in values:
            value.metadata_props.clear()


def _remove_casts(graph: ir.Graph) -> None:
    """Drop every Identity, and resolve CastLike, which ONNX Runtime does not fold, to Cast."""
    for node in tuple(graph):
        value, output = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type == "CastLike":
            dtype = output.dtype
            if dtype is None:
                continue
            node.op_type = "Cast"
            node.attributes["to"] = ir.AttrInt64("to", dtype)
            node.resize_inputs(1)
        elif node.op_type != "Identity":
            continue
        if value is not None and value.dtype == output.dtype and not output.is_graph_output():
            output.replace_all_uses_with(value)
            graph.remove(node, safe=True)


def _order_gelu(graph: ir.Graph) -> None:
    """Halve last: ``x * (0.5 * (1 + erf))`` becomes ``(x * (1 + erf)) * 0.5``, the same number.

    ONNX Runtime makes one fast node of GELU only when it comes in this order.
    """
    for half in graph:
        before = [value.producer() for value in half.inputs if value is not None]
        users = half.outputs[0].uses()
        if half.op_type != "Mul" or len(users) != 1 or half.outputs[0].is_graph_output():
            continue
        ((after, position),) = users
        if (
            after.op_type == "Mul"
            and [node and node.op_type for node in before] == ["Constant", "Add"]
            and any(
                value is not None and (node := value.producer()) and node.op_type == "Erf"
                for value in (before[1].inputs if before[1] else ())
            )
        ):
            factor, x = half.inputs[0], after.inputs[1 - position]
            assert factor is not None
            number = ir.convenience.get_const_tensor(factor)
            if number is None or number.numpy() != 0.5:
                continue
            half.replace_input_with(0, x)
            after.replace_input_with(1 - position, factor)


def _name_ends(graph: ir.Graph, source: ModelSource) -> None:
    """Give inputs and outputs the source's names; what is both, or twice, gets an Identity."""
    if len(graph.outputs) != len(source.outputs):
        raise InvalidInput(
            f"the model returns {len(graph.outputs)} outputs, but its source names "
            f"{len(source.outputs)} ({', '.join(source.outputs)}): name each one"
        )
    for value, spec in zip(graph.inputs, source.inputs, strict=True):
        value.name = spec.name
    for position, name in enumerate(source.outputs):
        value = graph.outputs[position]
        if value.producer() is None or value in graph.outputs[:position]:
            copy = ir.node("Identity", [value], name="Identity")
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.append(copy)
            graph.outputs[position] = value = copy.outputs[0]
        value.name = name
