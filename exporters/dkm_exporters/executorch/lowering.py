"""From a module and its palettes to the bytes of a ``.pte`` file."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from executorch.exir import EdgeProgramManager, to_edge
from executorch.exir.dialects._ops import ops as edge_ops
from executorch.runtime import Runtime
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from dkm_export.entry import PaletteEntry
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.folding import fold_batch_norm
from dkm_export.palette import Palette
from dkm_export.palettized import ModelSource, PalettizedModel
from dkm_exporters.executorch.blob import weight_keys, write_blob
from dkm_exporters.executorch.decode import (
    decode_rows,
    decode_weight,
    decoded_by,
    looks_up_rows,
)
from dkm_exporters.executorch.header import INPUTS_METHOD, PALETTES_METHOD, Header
from dkm_exporters.executorch.options import ExecuTorchOptions
from dkm_exporters.executorch.xnnpack import (
    constant_keys,
    delegates,
    exchange,
    is_delegate_call,
    keys_of,
    parameters_of,
    to_xnnpack,
)

_EMBEDDING = edge_ops.edge.aten.embedding.default


def lower(module: nn.Module, model: PalettizedModel, options: ExecuTorchOptions) -> bytes:
    """Lower ``module``, which is changed, to a program.

    Raises:
        Unsupported: when a library cannot express the model, no stock kernel runs an operator, or
            the model does not use a palette.
        InvalidInput: when the model returns another number of outputs than its source names.
    """
    inputs = _example_inputs(model.source, options)
    if options.backend == "coreml":
        edge, decodes = _coreml(module, inputs, model, options)
        return _emit(edge, model, options, model.palettes, decodes)
    _check_layers(module)
    palettes = fold_batch_norm(module, model.palettes, inputs, model.ties)
    weights = _Weights(module, palettes, model.ties)
    weights.decode_rows()
    if options.backend == "portable":
        weights.decode(palettes)
        program = _export(module, inputs, model.source, options)
        with _explained("ExecuTorch"):
            edge = to_edge(program)
        packed: dict[str, list[str]] = {}
    else:
        edge, packed = _delegate(module, inputs, model.source, weights, options)
    return _emit(edge, model, options, palettes, _decodes(edge.exported_program(), weights, packed))


def _emit(
    edge: EdgeProgramManager,
    model: PalettizedModel,
    options: ExecuTorchOptions,
    palettes: Mapping[str, Palette],
    decodes: Iterable[tuple[str, ...]],
) -> bytes:
    """The file, which says which parameters each of its decodes is for."""
    header = Header(
        backend=options.backend,
        layers={name: PaletteEntry.of(palette) for name, palette in palettes.items()},
        decodes=tuple(decodes),
    )
    _check_decoded(header)
    with _explained("ExecuTorch"):
        lowered = EdgeProgramManager(
            {"forward": edge.exported_program()},
            {
                PALETTES_METHOD: header.model_dump_json(),
                INPUTS_METHOD: [spec.name for spec in model.source.inputs],
            },
            edge.compile_config,
        ).to_executorch()
    _check_operators(lowered.executorch_program)
    return bytes(lowered.buffer)


class _Weights:
    """The palettized weights of a module, under all the names that the module has for them.

    Attributes:
        palettes: by parameter name.
        owners: by each name of such a parameter, its name in ``palettes``.
    """

    def __init__(
        self, module: nn.Module, palettes: Mapping[str, Palette], ties: Mapping[str, str]
    ) -> None:
        self._module = module
        self.palettes = palettes
        self.owners = _owners(palettes, ties)

    def decode_rows(self) -> None:
        """Let embeddings decode the rows that they look up."""
        for name, owner in self.owners.items():
            if looks_up_rows(self._module, name):
                decode_rows(self._module, name, self.palettes[owner])

    def decode(self, names: Container[str]) -> None:
        """Let these parameters be decoded where they are used, under any name."""
        for name, owner in self.owners.items():
            if owner in names:
                decode_weight(self._module, name, self.palettes[owner])


def _owners(palettes: Mapping[str, Palette], ties: Mapping[str, str]) -> dict[str, str]:
    """By each name of a palettized parameter, that of its palette."""
    return {name: name for name in palettes} | dict(ties)


def _check_layers(module: nn.Module) -> None:
    # The kernel exists but refuses such inputs, which shows only when the program runs.
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            raise Unsupported(
                f"executorch: {name}: the stock kernels have no 3-D convolutions; "
                "use 1-D or 2-D ones, or another target"
            )


def _example_inputs(source: ModelSource, options: ExecuTorchOptions) -> tuple[Tensor, ...]:
    """Inputs to trace with: where the app chooses the batch it is 2, as 1 means fixed."""
    if options.max_batch is None:
        return source.example_inputs()
    generator = torch.Generator().manual_seed(0)
    specs = (spec.model_copy(update={"shape": (2, *spec.shape[1:])}) for spec in source.inputs)
    return tuple(spec.random(generator) for spec in specs)


def _export(
    module: nn.Module, inputs: tuple[Tensor, ...], source: ModelSource, options: ExecuTorchOptions
) -> ExportedProgram:
    batch = None
    if options.max_batch is not None:
        size = Dim("batch", max=options.max_batch)
        batch = tuple({0: size} for _ in inputs)
    with _explained("torch.export"):
        program = torch.export.export(module, inputs, dynamic_shapes=batch)
        # A layer that only looks at its weight leaves a decode that would not reach the program.
        program.graph.eliminate_dead_code()
    _check_outputs(program, source)
    return program


@contextmanager
def _explained(library: str) -> Iterator[None]:
    """Turn whatever the library raises over a model into one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unsupported(
            f"executorch: {library} cannot lower the model: {reason}; rewrite that part of it"
        ) from error


def _check_outputs(program: ExportedProgram, source: ModelSource) -> None:
    count = len(program.graph_signature.user_outputs)
    if count != len(source.outputs):
        raise InvalidInput(
            f"the model returns {count} outputs, "
            f"its source names {len(source.outputs)}: {', '.join(source.outputs)}"
        )


def _delegate(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    source: ModelSource,
    weights: _Weights,
    options: ExecuTorchOptions,
) -> tuple[EdgeProgramManager, dict[str, list[str]]]:
    """Lower to XNNPACK, with palettes in place of the weights that it takes.

    Returns:
        The program; and by the key of a weight in it, the parameters that are this weight.
    """
    orders = {name: weight_keys(palette) for name, palette in weights.palettes.items()}
    while True:
        program = _export(module, inputs, source, options)
        with _explained("ExecuTorch"):
            edge = to_xnnpack(program)
        dense = _left_dense(edge.exported_program(), weights.owners, orders)
        if not dense:
            break
        # XNNPACK takes no part in these, or changes them on its way.
        weights.decode(dense)
        for name in dense:
            del orders[name]
    blobs: dict[str, bytes] = {}
    packed: dict[str, list[str]] = {}
    used = set[str]().union(*(keys_of(part) for _, part in delegates(edge.exported_program())))
    for name, order in orders.items():
        for key in used & order.keys():
            blob = write_blob(weights.palettes[name], order[key])
            if blobs.setdefault(key, blob) != blob:
                raise Unsupported(
                    f"executorch: {name} and {packed[key][0]} are the same weight with different "
                    "palettes: tie them, or set executorch.backend=portable"
                )
            packed.setdefault(key, []).append(name)
    exchange(edge.exported_program(), blobs)
    return edge, packed


def _coreml(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    model: PalettizedModel,
    options: ExecuTorchOptions,
) -> tuple[EdgeProgramManager, list[tuple[str, ...]]]:
    """Lower to Core ML; batch norms stay, as a palette times a scale is none to Core ML.

    Returns:
        The program, and the parameters of each decode, in order.
    """
    # It imports coremltools, which takes seconds and is there on some systems only.
    from dkm_exporters.executorch.coreml import finish, to_coreml, use_constexpr
    from dkm_exporters.executorch.ml_programs import read_part

    for name, owner in _owners(model.palettes, model.ties).items():
        use_constexpr(module, name, model.palettes[owner], owner)
    program = _export(module, inputs, model.source, options)
    with _explained("the Core ML delegate"):
        edge = to_coreml(program, options.coreml_precision)
    finish(edge.exported_program(), model.palettes, options.coreml_precision)
    parts = (part for _, part in delegates(edge.exported_program()))
    return edge, [(name,) for part in parts for name in read_part(part.processed_bytes, "it")]


def _left_dense(
    program: ExportedProgram,
    owners: Mapping[str, str],
    orders: Mapping[str, Mapping[str, object]],
) -> set[str]:
    """Parameters that the program has dense, if at all.

    Args:
        program: as `to_xnnpack` made it.
        owners: by each name of a palettized parameter, that of its palette.
        orders: the keys by which delegates may have it, by the name of the palette.
    """
    signature = program.graph_signature
    dense = {
        owners.get(signature.inputs_to_parameters.get(node.name, ""))
        for node in program.graph.find_nodes(op="placeholder")
        if node.users
    }
    found = set(_decoded_rows(program, owners))
    for _, part in delegates(program):
        keys = keys_of(part)
        taken = {owners.get(name) for name in parameters_of(part)} & orders.keys()
        kept = {name for name in taken if not keys.isdisjoint(orders[name])}
        dense |= taken - kept
        found |= kept
    return {name for name in orders if name in dense or name not in found}


def _decodes(
    program: ExportedProgram, weights: _Weights, packed: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, ...]]:
    """The parameters of each decode, in the order of the graph."""
    parts = (part for _, part in delegates(program))
    for node in program.graph.nodes:
        if name := _decoded(node, program, weights.owners):
            yield (name,)
        elif is_delegate_call(node):
            keys = constant_keys(next(parts).processed_bytes)
            yield from (tuple(packed[key]) for key in keys if key in packed)


def _decoded_rows(program: ExportedProgram, owners: Mapping[str, str]) -> Iterator[str]:
    for node in program.graph.nodes:
        if name := _decoded(node, program, owners):
            yield name


def _decoded(node: fx.Node, program: ExportedProgram, owners: Mapping[str, str]) -> str | None:
    """The parameter that is decoded by looking vectors up in its LUT, if ``node`` does that."""
    if node.target is not _EMBEDDING:
        return None
    table = node.args[0]
    # as float32, and for shared rows as scalars
    while table.op != "placeholder" and len(table.all_input_nodes) == 1:
        (table,) = table.all_input_nodes
    buffer = program.graph_signature.inputs_to_buffers.get(table.name)
    return owners.get(decoded_by(buffer or ""))


def _check_decoded(header: Header) -> None:
    decoded = {name for names in header.decodes for name in names}
    for name in header.layers:
        if name not in decoded:
            raise Unsupported(
                f"executorch: the program does not use the palette of {name}: "
                "add a rule with skip = true for it"
            )


def _check_operators(program: Any) -> None:
    stock = Runtime.get().operator_registry.operator_names
    for plan in program.execution_plan:
        for operator in plan.operators:
            name = f"{operator.name}.{operator.overload}"
            if name not in stock:
                raise Unsupported(
                    f"executorch: no stock kernel runs {name}; rewrite that part of the model"
                )
