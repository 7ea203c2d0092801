"""From a module and its palettes to the bytes of a ``.pte`` file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from executorch.exir import to_edge
from executorch.runtime import Runtime
from torch import nn
from torch.export import ExportedProgram

from dkm_export.entry import PaletteEntry
from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.folding import fold_batch_norm
from dkm_export.palettized import ModelSource, PalettizedModel
from dkm_exporters.executorch.decode import attach, decode_tensors
from dkm_exporters.executorch.header import INPUTS_METHOD, PALETTES_METHOD, Header

_EMBEDDING = torch.ops.aten.embedding.default


def lower(module: nn.Module, model: PalettizedModel) -> bytes:
    """Lower ``module``, which is changed, to a program without delegates.

    Raises:
        Unsupported: when a library cannot express the model, no stock kernel runs an operator, or
            the model does not use a palette.
        InvalidInput: when the model returns another number of outputs than its source names.
    """
    _check_layers(module)
    source, palettes = model.source, model.palettes
    inputs = source.example_inputs()
    folded = fold_batch_norm(module, palettes, inputs, model.ties)
    with _explained("torch.export"):
        attach(module, folded, model.ties)
        program = torch.export.export(module, inputs)
        # A layer that only looks at its weight leaves a decode that would not reach the program.
        program.graph.eliminate_dead_code()
    _check_outputs(program, source)
    header = Header(
        layers={name: PaletteEntry.of(palette) for name, palette in palettes.items()},
        decodes=_decodes(program, model),
    )
    with _explained("ExecuTorch"):
        edge = to_edge(
            program,
            constant_methods={
                PALETTES_METHOD: header.model_dump_json(),
                INPUTS_METHOD: [spec.name for spec in source.inputs],
            },
        )
        lowered = edge.to_executorch()
    _check_decoded(lowered.exported_program(), header, model.ties)
    _check_operators(lowered.executorch_program)
    return bytes(lowered.buffer)


def _check_layers(module: nn.Module) -> None:
    # The kernel exists but refuses such inputs, which shows only when the program runs.
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            raise Unsupported(
                f"executorch: {name}: the stock kernels have no 3-D convolutions; "
                "use 1-D or 2-D ones, or another target"
            )


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


def _decodes(program: ExportedProgram, model: PalettizedModel) -> tuple[str, ...]:
    """The parameter of each lookup in a LUT, in the order of the graph."""
    buffers = program.graph_signature.inputs_to_buffers
    luts = {decode_tensors(name).lut: name for name in model.palettes}
    luts |= {decode_tensors(name).lut: owner for name, owner in model.ties.items()}
    lookups = [node for node in program.graph.nodes if node.target is _EMBEDDING]
    # The table of a lookup is the LUT as float32: one conversion after the placeholder.
    sources = [source for node in lookups for source in node.args[0].all_input_nodes]
    looked_up = [buffers.get(source.name) for source in sources]
    return tuple(luts[buffer] for buffer in looked_up if buffer in luts)


def _check_decoded(program: ExportedProgram, header: Header, ties: Mapping[str, str]) -> None:
    """The final graph takes every LUT and all indices: no pass has folded them."""
    signature = program.graph_signature
    owners = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    taken = {owners.get(node.name) for node in program.graph.nodes if node.users}
    for name in header.layers:
        names = [name, *(tie for tie, owner in ties.items() if owner == name)]
        decoded = any(taken.issuperset(decode_tensors(alias)) for alias in names)
        if name not in header.decodes or not decoded:
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
