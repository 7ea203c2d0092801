"""Lowering to XNNPACK, and the exchange of the dense weights in the result for palettes.

XNNPACK's own lowering runs as it is, on dense weights. It names each constant after the hash of its
bytes, in the order of axes that XNNPACK wants; so a weight is found by what it is, whatever the
lowering did to get there, and one that it has changed is not found.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final

import torch
from executorch.backends.xnnpack import serialization
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import EdgeProgramManager, to_edge_transform_and_lower
from executorch.exir._serialize._flatbuffer import _flatc_compile, _flatc_decompile
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir._serialize.padding import aligned_size, pad_to
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import fx
from torch.export import ExportedProgram

from dkm_export.errors import Unsupported
from dkm_exporters.executorch.blob import weight_keys, write_blob
from dkm_exporters.executorch.decode import is_decode
from dkm_exporters.executorch.options import Precision
from dkm_exporters.executorch.weights import Weights
from dkm_exporters.executorch.xnnpack_graph import read_constants

LUT_BACKEND: Final = "DkmXnnpackBackend"
"""The name under which `native/lut_backend.cpp` registers itself."""

BLOB_PREFIX: Final = "dkm.lut:"
"""Of the key of a palette; what follows is the key of the weight that it expands to."""

_DENSE_BYTES: Final = "dkm.dense_bytes"
"""Key of what the dense weights of a part need, which our delegate allocates at once."""

_OVERHEAD: Final = 192
"""Of each of them, as `native/dense_memory.h` says."""

_ALIGNMENT: Final = 16
"""Of the graph and of the constants in a delegated part."""

_INFINITE: Final = re.compile(rb":\s*(-?)inf\b")
"""A number that flatc writes as JSON does not know it: the bounds of activations without any."""


class Partitioner(XnnpackPartitioner):  # type: ignore[misc]
    """Leaves decodes to the portable kernels, where they are found again when the file is read."""

    def get_matched_nodes_from_configs(self, ep: ExportedProgram) -> list[list[fx.Node]]:
        matches = super().get_matched_nodes_from_configs(ep)
        return [match for match in matches if not any(map(is_decode, match))]


@dataclass
class Packed:
    """The palettized weights that delegates take, by their key.

    Attributes:
        program: that has the delegates.
        blobs: as `write_blob` makes them.
        names: of the parameters that are this weight.
    """

    program: ExportedProgram
    blobs: dict[str, bytes] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def of_part(self, node: fx.Node) -> Iterator[tuple[str, ...]]:
        """The parameters of each packed weight that a node's delegate asks for, in order."""
        if is_delegate_call(node):
            place: Any = node.args[0]
            part = getattr(self.program.graph_module, place.target)
            for constant in read_constants(part.processed_bytes):
                if constant.place.key in self.names:
                    yield tuple(self.names[constant.place.key])


def delegate(
    export: Callable[[], ExportedProgram], weights: Weights, precision: Precision
) -> tuple[EdgeProgramManager, Packed]:
    """Lower to XNNPACK with dense weights; weights that it cannot have are decoded in the graph.

    Args:
        export: traces the module as it is then.
        weights: of the module, which is changed.
        precision: of the dense weights in the module.

    Returns:
        The program, and the palettes of the weights that its delegates have.

    Raises:
        Unsupported: when a weight has two different palettes.
    """
    keys = {name: weight_keys(palette, precision) for name, palette in weights.palettes.items()}
    while True:
        edge = to_edge_transform_and_lower(export(), partitioner=[Partitioner()])
        dense = _left_dense(edge.exported_program(), weights, keys)
        if not dense:
            break
        # XNNPACK takes no part in these, or changes them on its way.
        weights.decode(dense)
        for name in dense:
            del keys[name]
    packed = Packed(edge.exported_program())
    used = set[str]().union(*(_keys(part) for _, part in delegates(packed.program)))
    for name, forms in keys.items():
        for key in used & forms.keys():
            blob = write_blob(weights.palettes[name], forms[key])
            if packed.blobs.setdefault(key, blob) != blob:
                raise Unsupported(
                    f"executorch: {name} and {packed.names[key][0]} are the same weight with "
                    "different palettes: tie them, or set executorch.backend=portable"
                )
            packed.names.setdefault(key, []).append(name)
    return edge, packed


def _left_dense(
    program: ExportedProgram, weights: Weights, orders: Mapping[str, Mapping[str, object]]
) -> set[str]:
    """Parameters that a program lowered with dense weights has dense, if at all.

    Args:
        program: the program.
        weights: of the module.
        orders: the keys by which delegates may have a weight, by the name of its palette.
    """
    signature = program.graph_signature
    dense = {
        weights.owners.get(signature.inputs_to_parameters.get(node.name, ""), "")
        for node in program.graph.find_nodes(op="placeholder")
        if node.users
    }
    found = {name for names in weights.decodes(program) for name in names}
    for _, part in delegates(program):
        keys = _keys(part)
        taken = {weights.owners.get(name, "") for name in _parameters(part)} & orders.keys()
        kept = {name for name in taken if not keys.isdisjoint(orders[name])}
        dense |= taken - kept
        found |= kept
    return {name for name in orders if name in dense or name not in found}


def is_delegate_call(node: fx.Node) -> bool:
    """Whether a node calls a delegated part of the program."""
    return node.target is torch.ops.higher_order.executorch_call_delegate


def delegates(program: ExportedProgram) -> Iterator[tuple[str, LoweredBackendModule]]:
    """The delegated parts of a program and the names of their attributes, in the order of calls."""
    for node in program.graph.nodes:
        if is_delegate_call(node):
            name = node.args[0].target
            yield name, getattr(program.graph_module, name)


def _parameters(part: LoweredBackendModule) -> set[str]:
    """Names of the parameters that a delegated part takes."""
    return set(part.original_module.graph_signature.inputs_to_parameters.values())


def _keys(part: LoweredBackendModule) -> set[str]:
    """Names of the constants that a delegated part holds."""
    store = part.named_data_store_output
    return set() if store is None else set(store.pte_data)


def exchange(program: ExportedProgram, blobs: Mapping[str, bytes]) -> None:
    """Exchange the dense weights in the delegates of ``program``, in place, for palettes.

    Our delegate takes XNNPACK's place.

    Args:
        program: as `delegate` made it.
        blobs: packed weights by the key of the dense one.
    """
    packed = {key: {BLOB_PREFIX + key: blob} for key, blob in blobs.items()}
    _replace_data(program, LUT_BACKEND, packed)


def take_out(program: ExportedProgram, keys: Iterable[str]) -> None:
    """Take dense weights out of the delegates of ``program``, in place.

    XNNPACK will look for them in a ``.ptd`` file.

    Args:
        program: as `delegate` made it.
        keys: of the weights.
    """
    _replace_data(program, XnnpackBackend.__name__, {key: {} for key in keys})


def _replace_data(
    program: ExportedProgram, backend: str, replacements: Mapping[str, Mapping[str, bytes]]
) -> None:
    for name, part in delegates(program):
        store, replaced_bytes = NamedDataStore(), 0
        before = part.named_data_store_output
        for key, entry in before.pte_data.items() if before is not None else ():
            dense = before.buffers[entry.buffer_index]
            if key in replacements:
                replaced_bytes += len(dense) + _OVERHEAD
            for new, data in replacements.get(key, {key: dense}).items():
                store.add_named_data(new, data, entry.alignment)
        specs = []
        if backend == LUT_BACKEND:
            specs = [CompileSpec(_DENSE_BYTES, replaced_bytes.to_bytes(8, "little"))]
        replaced = LoweredBackendModule(
            part.original_module,
            backend,
            part.processed_bytes,
            [*part.compile_specs, *specs],
            store.get_named_data_store_output(),
        )
        replaced.meta = part.meta
        setattr(program.graph_module, name, replaced)


def read_graph(processed: bytes) -> Any:
    """The graph of a delegated part, as the JSON of its schema.

    Raises:
        ValueError, KeyError, RuntimeError: when it is malformed.
    """
    header = _header(processed)
    start = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = _schema(folder), Path(folder, "graph.bin")
        binary.write_bytes(processed[start : start + header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        text = binary.with_suffix(".json").read_bytes()
        return json.loads(_INFINITE.sub(rb": \1Infinity", text))


def replace_graph(processed: bytes, graph: Any) -> bytes:
    """The delegated part with another graph, which `read_graph` gave and was edited."""
    before = _header(processed)
    with tempfile.TemporaryDirectory() as folder:
        schema, text = _schema(folder), Path(folder, "graph.json")
        text.write_text(json.dumps(graph))
        _flatc_compile(folder, str(schema), str(text))
        binary = text.with_suffix(".bin").read_bytes()
    start = aligned_size(XNNHeader.EXPECTED_LENGTH, _ALIGNMENT)
    constants = start + aligned_size(len(binary), _ALIGNMENT)
    header = XNNHeader(start, len(binary), constants, before.constant_data_size)
    rest = processed[before.constant_data_offset :][: before.constant_data_size]
    content: bytes = pad_to(pad_to(header.to_bytes(), start) + binary, constants) + rest
    return content


def _header(processed: bytes) -> XNNHeader:
    return XNNHeader.from_bytes(processed[: XNNHeader.EXPECTED_LENGTH])


def _schema(folder: str) -> Path:
    """XNNPACK's schema, as a file for flatc."""
    schema = Path(folder, "schema.fbs")
    schema.write_bytes(resources.files(serialization).joinpath("schema.fbs").read_bytes())
    return schema
