"""From a torch module to an ONNX graph that is clean, but whose weights are still dense."""

from __future__ import annotations

import ast
import re
from typing import Final

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass
from onnxscript.version_converter import ConvertVersionPass
from torch import Tensor, nn

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.palettized import InputSpec, ModelSource
from dkm_exporters.onnx.options import OnnxOptions

_OWN_OPSET: Final = 18
"""The oldest that torch writes by itself."""

_FUNCTIONS_FROM: Final = 8
"""IR version that brought model-local functions. ONNX Runtime 1.16 takes up to version 9."""

_OPERATOR = re.compile(r"call_function\[target=torch\.ops\.([\w.]+)\]")


def example_inputs(source: ModelSource, options: OnnxOptions) -> tuple[Tensor, ...]:
    """Inputs to trace with: where the app chooses a size it is at least 2, as 1 means fixed."""
    generator = torch.Generator().manual_seed(0)
    return tuple(_example(spec, options, generator) for spec in source.inputs)


def trace(
    module: nn.Module, inputs: tuple[Tensor, ...], source: ModelSource, options: OnnxOptions
) -> ir.Model:
    """Export ``module``; weights keep their parameter names, inputs and outputs take the source's.

    Nothing is folded or fused: torch's and onnxscript's optimizers rename, transpose and merge
    weights, after which no palette could be found again.

    Raises:
        Unsupported: when ONNX, or the chosen opset, has no equivalent of an operator, or the model
            fixes the size of an axis that is to be dynamic.
        InvalidInput: when the module returns another number of outputs than the source names.
    """
    axes = tuple(dict(options.dynamic_axes.get(spec.name, {})) for spec in source.inputs)
    try:
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            optimize=False,
            opset_version=max(options.opset, _OWN_OPSET),
            verbose=False,
            dynamic_shapes=axes if any(axes) else None,
        )
    except torch.onnx.OnnxExporterError as error:
        raise Unsupported(f"onnx: {_explain(error)}") from error
    assert program is not None
    model = program.model
    _require_dynamic(model.graph, source, options)
    model.graph.name = source.name
    ShapeInferencePass()(model)
    _remove_casts(model.graph)
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


def _require_dynamic(graph: ir.Graph, source: ModelSource, options: OnnxOptions) -> None:
    for value, spec in zip(graph.inputs, source.inputs, strict=True):
        for axis in options.dynamic_axes.get(spec.name, {}):
            assert value.shape is not None
            if isinstance(size := value.shape[axis], int):
                raise Unsupported(
                    f"onnx: the model fixes axis {axis} of '{spec.name}' to {size}: "
                    "leave it out of onnx.dynamic_axes, or change the model's code"
                )


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
                f"set onnx.opset to {min(since)} or more"
            )
    ConvertVersionPass(opset, fallback=True)(model)
    if model.graph.opset_imports[""] != opset:
        raise Unsupported(
            f"onnx: the model's operators cannot be written in opset {opset}: "
            f"leave onnx.opset at {_OWN_OPSET}, or a later one"
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
