"""Lowering to XNNPACK, and the exchange of the dense weights in the result for palettes.

XNNPACK's own lowering runs as it is, on dense weights. It names each constant after the hash of its
bytes, in the order of axes that XNNPACK wants; so a weight is found by what it is, whatever the
lowering did to get there, and one that it has changed is not found.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final

import torch
from executorch.backends.xnnpack import serialization
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import EdgeProgramManager, to_edge_transform_and_lower
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import fx
from torch.export import ExportedProgram

from dkm_exporters.executorch.decode import is_decode

LUT_BACKEND: Final = "DkmXnnpackBackend"
"""The name under which `native/lut_backend.cpp` registers itself."""

BLOB_PREFIX: Final = "dkm.lut:"
"""Of the key of a palette; what follows is the key of the weight that it expands to."""

_INFINITE: Final = re.compile(rb":\s*(-?)inf\b")
"""A number that flatc writes as JSON does not know it: the bounds of activations without any."""


class Partitioner(XnnpackPartitioner):  # type: ignore[misc]
    """Leaves decodes to the portable kernels, where they are found again when the file is read."""

    def get_matched_nodes_from_configs(self, ep: ExportedProgram) -> list[list[fx.Node]]:
        matches = super().get_matched_nodes_from_configs(ep)
        return [match for match in matches if not any(map(is_decode, match))]


def to_xnnpack(program: ExportedProgram) -> EdgeProgramManager:
    """Lower with dense weights."""
    return to_edge_transform_and_lower(program, partitioner=[Partitioner()])


def is_delegate_call(node: fx.Node) -> bool:
    """Whether a node calls a delegated part of the program."""
    return node.target is torch.ops.higher_order.executorch_call_delegate


def delegates(program: ExportedProgram) -> Iterator[tuple[str, LoweredBackendModule]]:
    """The delegated parts of a program and the names of their attributes, in the order of calls."""
    for node in program.graph.nodes:
        if is_delegate_call(node):
            name = node.args[0].target
            yield name, getattr(program.graph_module, name)


def parameters_of(part: LoweredBackendModule) -> set[str]:
    """Names of the parameters that a delegated part takes."""
    return set(part.original_module.graph_signature.inputs_to_parameters.values())


def keys_of(part: LoweredBackendModule) -> set[str]:
    """Names of the constants that a delegated part holds."""
    store = part.named_data_store_output
    return set() if store is None else set(store.pte_data)


def exchange(program: ExportedProgram, blobs: Mapping[str, bytes]) -> None:
    """Exchange the dense weights in the delegates of ``program``, in place, for palettes.

    Our delegate takes XNNPACK's place.

    Args:
        program: as `to_xnnpack` made it.
        blobs: packed weights by the key of the dense one.
    """
    _replace_data(program, LUT_BACKEND, {key: {BLOB_PREFIX + key: blobs[key]} for key in blobs})


def take_out(program: ExportedProgram, keys: Iterable[str]) -> None:
    """Take dense weights out of the delegates of ``program``, in place.

    XNNPACK will look for them in a ``.ptd`` file.

    Args:
        program: as `to_xnnpack` made it.
        keys: of the weights.
    """
    _replace_data(program, XnnpackBackend.__name__, {key: {} for key in keys})


def _replace_data(
    program: ExportedProgram, backend: str, replacements: Mapping[str, Mapping[str, bytes]]
) -> None:
    for name, part in delegates(program):
        store = NamedDataStore()
        before = part.named_data_store_output
        for key, entry in before.pte_data.items() if before is not None else ():
            dense = {key: before.buffers[entry.buffer_index]}
            for new, data in replacements.get(key, dense).items():
                store.add_named_data(new, data, entry.alignment)
        replaced = LoweredBackendModule(
            part.original_module,
            backend,
            part.processed_bytes,
            part.compile_specs,
            store.get_named_data_store_output(),
        )
        replaced.meta = part.meta
        setattr(program.graph_module, name, replaced)


def constant_keys(processed: bytes) -> list[str]:
    """Names of the constants that a delegated part computes with, in the order of its values.

    Args:
        processed: the part as XNNPACK's lowering wrote it.

    Raises:
        ValueError, KeyError, RuntimeError: when it is malformed.
    """
    graph = _graph(processed)
    names = [constant["named_key"] for constant in graph["constant_data"]]
    values = (value["xvalue_union"] for value in graph["xvalues"])
    tensors = (value.get("tensor_value", value) for value in values)
    # Buffer 0 stands for no constant.
    return [names[index] for value in tensors if (index := value["constant_buffer_idx"])]


def _graph(processed: bytes) -> Any:
    header = XNNHeader.from_bytes(processed[: XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder, "schema.fbs"), Path(folder, "graph.bin")
        schema.write_bytes(resources.files(serialization).joinpath("schema.fbs").read_bytes())
        binary.write_bytes(processed[start : start + header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        text = binary.with_suffix(".json").read_bytes()
        return json.loads(_INFINITE.sub(rb": \1Infinity", text))
