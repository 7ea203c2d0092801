"""Lowering to ExecuTorch's Core ML delegate, with palettes as constants of its ML programs.

An operator of ours stands for each palettized weight. Core ML's own lowering runs as it is and
finds in coremltools' registry what that operator becomes: ``constexpr_lut_to_dense``.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.backends.apple.coreml.compiler.coreml_preprocess import COMPILE_SPEC_KEYS
from executorch.backends.apple.coreml.partition import CoreMLPartitioner
from executorch.exir import EdgeProgramManager, to_edge_transform_and_lower
from executorch.exir.backend.partitioner import PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from executorch.exir.dialects._ops import ops as edge_ops
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.utils import parametrize

from dkm_export.errors import Unsupported
from dkm_export.palette import Layout, Palette
from dkm_exporters.executorch.folders import pack_folder, unpack_folder
from dkm_exporters.executorch.ml_programs import METADATA, PACKAGE, write_files
from dkm_exporters.executorch.options import Precision
from dkm_exporters.executorch.xnnpack import delegates
from dkm_exporters.mlprogram.emission import REMOVED_PASSES, SUFFIXES, float_lut, lut_to_dense
from dkm_exporters.mlprogram.messages import model_warnings
from dkm_exporters.mlprogram.palettes import LAYERS_KEY, layers_metadata
from dkm_exporters.mlprogram.writing import palettes_missing, read_model, write_model

_PRECISIONS: Final = {"fp16": ct.precision.FLOAT16, "fp32": ct.precision.FLOAT32}
_TAG: Final = "delegation_tag"
"""ExecuTorch's key for the part that a node goes to."""

_DEBUG_FILES: Final = ("debug_info.json", f"{PACKAGE}/executorch_debug_handle_mapping.json")
"""For profilers, and larger than a small network."""

_DATE: Final = "com.github.apple.coremltools.conversion_date"


@torch.library.custom_op("dkm::lut_to_dense", mutates_args=())
def _lut_to_dense(indices: Tensor, lut: Tensor, axis: int, name: str) -> Tensor:
    """The weight of a palette.

    Args:
        indices: uint8 of the layout's ``index_shape``.
        lut: float16 ``[groups, 2**bits, dim]``.
        axis: of the layout.
        name: the parameter.

    Returns:
        float32 of the layout's shape.
    """
    return torch.from_numpy(_palette(indices.numpy(), lut.numpy(), axis).dense())


@_lut_to_dense.register_fake
def _(indices: Tensor, lut: Tensor, axis: int, name: str) -> Tensor:
    shape = list(indices.shape)
    shape[axis] *= lut.shape[2]
    return indices.new_empty(shape, dtype=torch.float32)


_DECODE = edge_ops.edge.dkm.lut_to_dense.default


@register_torch_op(torch_alias=["dkm::lut_to_dense", "dkm.lut_to_dense"])  # type: ignore[untyped-decorator]
def dkm_lut_to_dense(context: Any, node: Any) -> None:
    """What the operator becomes: once for each palette, however many layers use it."""
    *constants, axis, name = node.inputs
    known = f"dkm::{name}"
    if known not in context:
        indices, lut = (context[constant].val for constant in constants)
        palette = _palette(indices.astype(np.uint8), lut.astype(np.float16), axis)
        context.add(lut_to_dense(palette, float_lut(palette), name=_operation(name)), known)
    context.add(context[known], node.name)


def _palette(indices: Any, lut: Any, axis: int) -> Palette:
    groups, entries, dim = lut.shape
    shape = list(indices.shape)
    shape[axis] *= dim
    return Palette(entries.bit_length() - 1, Layout(tuple(shape), dim, axis, groups), lut, indices)


def _operation(name: str) -> str:
    """The operation that a parameter's palette becomes; names in ML programs have no dots."""
    return "p_" + "".join(character if character.isalnum() else "_" for character in name)


class _Constexpr(nn.Module):
    """Parametrization whose original is the indices instead of a dense weight."""

    lut: Tensor

    def __init__(self, palette: Palette, name: str) -> None:
        super().__init__()
        self._name, self._axis = name, palette.layout.axis
        self._indices = torch.from_numpy(palette.indices)
        self.register_buffer("lut", torch.from_numpy(palette.lut))

    def right_inverse(self, _: Tensor) -> tuple[Tensor]:
        """The indices; a tuple, because a lone tensor would have to keep the dtype."""
        return (self._indices,)

    def forward(self, indices: Tensor) -> Tensor:
        """uint8 indices to the float32 weight."""
        weight: Tensor = torch.ops.dkm.lut_to_dense(indices, self.lut, self._axis, self._name)
        return weight


def use_constexpr(module: nn.Module, name: str, palette: Palette, owner: str) -> None:
    """Replace the weight ``name`` by the operator that Core ML's lowering takes, in place.

    Args:
        module: the model.
        name: of the parameter.
        palette: its own.
        owner: the parameter that it shares the palette with, or its own name.
    """
    path, _, weight = name.rpartition(".")
    layer = module.get_submodule(path)
    if not parametrize.is_parametrized(layer, weight):  # one module can have two names
        parametrize.register_parametrization(layer, weight, _Constexpr(palette, owner), unsafe=True)


class _Partitioner(CoreMLPartitioner):  # type: ignore[misc]
    """Keeps what is made of constants alone in the part that uses it."""

    def __init__(self, precision: Precision) -> None:
        passes = ct.PassPipeline.DEFAULT
        passes.remove_passes(REMOVED_PASSES)
        specs = CoreMLBackend.generate_compile_specs(
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=_PRECISIONS[precision],
            pass_names=passes.passes,
        )
        super().__init__(compile_specs=specs, take_over_constant_data=False)

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        tags = super().partition(exported_program).partition_tags
        constants = _constants(exported_program)
        for node in reversed(exported_program.graph.nodes):
            users = {user.meta.get(_TAG) for user in node.users}
            if node in constants and _TAG in node.meta and len(users) == 1 and None not in users:
                (node.meta[_TAG],) = users
        _check_shared(exported_program)
        tag_constant_data(exported_program)
        used = {node.meta.get(_TAG) for node in exported_program.graph.nodes}
        return PartitionResult(
            exported_program, {tag: spec for tag, spec in tags.items() if tag in used}
        )


def _check_shared(program: ExportedProgram) -> None:
    """Refuse what coremltools 9.0 would stumble over: it then gets two constants of one name."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.graph.find_nodes(op="placeholder"):
        tags = [user.meta[_TAG] for user in node.users if _TAG in user.meta]
        if node.name in names and 1 < len(set(tags)) < len(tags):
            raise ValueError(
                f"{names[node.name]} is used by several parts of it, and twice by one of them"
            )


def to_coreml(program: ExportedProgram, precision: Precision) -> EdgeProgramManager:
    """Lower a program whose palettized weights are made by `use_constexpr`."""
    with model_warnings("executorch"):
        return to_edge_transform_and_lower(program, partitioner=[_Partitioner(precision)])


def finish(program: ExportedProgram, palettes: Mapping[str, Palette], precision: Precision) -> None:
    """Check the delegates of ``program`` and give them layer names and bytes that do not change.

    Args:
        program: as `to_coreml` made it; changed in place.
        palettes: by parameter name.
        precision: it was lowered with.

    Raises:
        Unsupported: when a palettized weight ended up dense.
    """
    for names in _constants(program).values():
        _refuse_dense(names)
    for attribute, part in delegates(program):
        constants = _constants(part.original_module)
        for node in part.original_module.graph.output_node().all_input_nodes:
            _refuse_dense(constants.get(node, set()))
        operations = {
            f"{_operation(name)}{SUFFIXES[precision]}": name
            for name in sorted(set().union(*constants.values()))
        }
        packed = LoweredBackendModule(
            part.original_module,
            part.backend_id,
            _rewritten(part.processed_bytes, operations, palettes),
            # coremltools' passes have run.
            [s for s in part.compile_specs if s.key != COMPILE_SPEC_KEYS.PASS_PIPELINE.value],
            part.named_data_store_output,
        )
        packed.meta = part.meta
        setattr(program.graph_module, attribute, packed)


def _refuse_dense(names: set[str]) -> None:
    for name in sorted(names):
        raise Unsupported(
            f"executorch: {name}: Core ML does not take what uses this weight, which would be "
            "dense: skip the layer in the recipe, or set executorch.backend=xnnpack-lut or portable"
        )


def _constants(program: ExportedProgram) -> dict[fx.Node, set[str]]:
    """The nodes that no input reaches, and the parameters whose palettes each is made of."""
    inputs = set(program.graph_signature.user_inputs)
    found: dict[fx.Node, set[str]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name not in inputs:
                found[node] = set()
        elif node.op == "call_function" and all(n in found for n in node.all_input_nodes):
            found[node] = set().union(*(found[n] for n in node.all_input_nodes))
            if node.target == _DECODE:
                found[node].add(node.args[3])
    return found


def _rewritten(
    processed: bytes, operations: Mapping[str, str], palettes: Mapping[str, Palette]
) -> bytes:
    """What a delegate is given, with layer names, and ids that follow from its content."""
    files = unpack_folder(processed)
    for path in _DEBUG_FILES:
        files.pop(path, None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_files(files, folder)
        spec = read_model(folder / PACKAGE)
        for operation in palettes_missing(spec, operations):
            raise Unsupported(
                f"executorch: {operations[operation]}: the ML program has no palette "
                f"'{operation}': rename the layer, or what else has that name"
            )
        metadata = spec.description.metadata.userDefined
        metadata[LAYERS_KEY] = layers_metadata(operations, palettes)
        metadata.pop(_DATE, None)
        _allow_one_sample(spec.description)
        write_model(folder / PACKAGE, spec)
        for path in files:
            files[path] = (folder / path).read_bytes()
    names = json.loads(files.pop(METADATA))
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path}\0{len(files[path])}\0".encode())
        digest.update(files[path])
    # The app caches the compiled model under this name.
    names["identifier"] = f"executorch_{digest.hexdigest()}"
    files[METADATA] = json.dumps(names).encode()
    return pack_folder(dict(sorted(files.items())))


def _allow_one_sample(description: Any) -> None:
    """Let sizes that vary begin at 1: torch.export says 2, as it takes 1 for fixed."""
    for entry in description.input:
        for sizes in entry.type.multiArrayType.shapeRange.sizeRanges:
            if sizes.lowerBound != sizes.upperBound:
                sizes.lowerBound = 1
