"""Lowering for the stock runtime: ``init`` decodes the weights once, ``forward`` uses them.

The weights lie in mutable buffers, which both methods have at the same place of memory and which
take no room in the file. XNNPACK takes them as inputs of a linear layer.

A ``forward`` without ``init`` would compute with whatever the memory holds. So ``init`` writes a
token after the weights, and ``forward`` gives NaN wherever it does not find this token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.dialects._ops import ops as edge_ops
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from dkm_export.errors import Unsupported
from dkm_export.palette import Palette
from dkm_exporters.executorch.decode import Decode
from dkm_exporters.executorch.header import TOKEN
from dkm_exporters.executorch.xnnpack import Partitioner

_GUARD, _, _BUFFER = TOKEN.partition(".")
_VIEW: Final = edge_ops.edge.aten.view_copy.default
_COPY: Final = torch.ops.aten.copy_.default


class _Guard(nn.Module):
    """Knows whether ``init`` has run.

    Attributes:
        token: int32 ``[8]``; what ``init`` writes is a hash of the palettes, so that what another
            program left in the same memory is not taken for it.
    """

    token: Tensor

    def __init__(self, palettes: Mapping[str, Palette]) -> None:
        super().__init__()
        digest = hashlib.sha256()
        for name, palette in sorted(palettes.items()):
            digest.update(name.encode() + palette.lut.tobytes() + palette.packed.tobytes())
        expected = np.frombuffer(digest.digest(), np.int32).copy()
        self.register_buffer(_BUFFER, torch.zeros(len(expected), dtype=torch.int32))
        # Not a buffer: ExecuTorch takes a copy from one buffer to another for one in place.
        self.expected = torch.from_numpy(expected)

    def forward(self, output: Tensor) -> Tensor:
        """``output``, or NaN; integers as they are, which `held` refuses."""
        if not output.is_floating_point():
            return output
        ready = (self.token == self.expected).all()
        return torch.where(ready, output, torch.full((), float("nan")))


def hold(module: nn.Module, owners: Mapping[str, str], palettes: Mapping[str, Palette]) -> None:
    """Turn the palettized weights of ``module`` into buffers and guard its outputs, in place.

    Args:
        module: what ``forward`` will run.
        owners: by each name of a palettized weight, its name in ``palettes``.
        palettes: by parameter name.
    """
    buffers = {name: torch.zeros(palette.layout.shape) for name, palette in palettes.items()}
    for name, owner in owners.items():
        path, _, weight = name.rpartition(".")
        layer = module.get_submodule(path)
        if isinstance(layer._parameters.get(weight), Tensor):  # one module can have two names
            del layer._parameters[weight]
            layer.register_buffer(weight, buffers[owner])
    guard = _Guard(palettes)
    module.add_module(_GUARD, guard)
    module.register_forward_hook(
        lambda _, __, outputs: pytree.tree_map_only(Tensor, guard, outputs)
    )


def held(program: ExportedProgram, owners: Mapping[str, str]) -> dict[str, str]:
    """The weights that ``forward`` uses: the name of the buffer, and that of the palette.

    The buffers that it does not use are removed; they would be stored as constants.

    Raises:
        Unsupported: when an output cannot be NaN.
    """
    signature = program.graph_signature
    for node in program.graph.output_node().all_input_nodes:
        if node.name in signature.user_outputs and not node.meta["val"].dtype.is_floating_point:
            raise Unsupported(
                "executorch: the model returns integers, which cannot be NaN where an app did not "
                "run init: set executorch.backend to another one"
            )
    used: dict[str, str] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        name = signature.inputs_to_buffers.get(node.name, "")
        if name not in owners:
            continue
        if node.users:
            used[name] = owners[name]
        else:
            program.graph.erase_node(node)
            kept = [spec for spec in signature.input_specs if spec.arg.name != node.name]
            signature.input_specs[:] = kept
    return used


class _Init(nn.Module):
    """What ``init`` runs. Its buffers have the names that they have in ``forward``."""

    def __init__(self, weights: Mapping[str, str], palettes: Mapping[str, Palette]) -> None:
        super().__init__()
        self._weights = list(weights)
        for index, (name, owner) in enumerate(weights.items()):
            palette = palettes[owner]
            path, _, weight = name.rpartition(".")
            _made(self, path).register_buffer(weight, torch.zeros(palette.layout.shape))
            decode = Decode(palette, torch.float32)
            (packed,) = decode.right_inverse(torch.empty(0))
            self.register_buffer(f"dkm_packed{index}", packed)
            self.add_module(f"dkm_decode{index}", decode)
        # The last buffer is the last to be written: the token says that all others are.
        self.add_module(_GUARD, _Guard(palettes))

    def forward(self) -> None:
        for index, name in enumerate(self._weights):
            decode = self.get_submodule(f"dkm_decode{index}")
            self.get_buffer(name).copy_(decode(self.get_buffer(f"dkm_packed{index}")))
        guard = self.get_submodule(_GUARD)
        assert isinstance(guard, _Guard)
        guard.token.copy_(guard.expected)


def _made(root: nn.Module, path: str) -> nn.Module:
    """The submodule of this path, made if there is none."""
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root


def export_init(weights: Mapping[str, str], palettes: Mapping[str, Palette]) -> ExportedProgram:
    """The method that decodes ``weights``, as `held` gives them."""
    return torch.export.export(_Init(weights, palettes), ())


class _DynamicPartitioner(Partitioner):
    """Leaves buffers that ``init`` writes out of the delegates, which take them as inputs.

    So do their biases: XNNPACK copies constants when it packs the weight, which it then does not
    do, and its delegate frees them once it is loaded. Other layers stay constants of the delegate.
    """

    def __init__(self, buffers: Collection[str]) -> None:
        super().__init__()
        self._buffers = buffers

    def partition(self, exported_program: ExportedProgram) -> Any:
        result = super().partition(exported_program)
        names = exported_program.graph_signature.inputs_to_buffers
        for node in exported_program.graph.find_nodes(op="placeholder"):
            if names.get(node.name) in self._buffers:
                for user in node.users:
                    for source in user.all_input_nodes:
                        if source.op == "placeholder":
                            source.meta.pop("delegation_tag", None)
        return result


def to_two_methods(
    forward: ExportedProgram, init: ExportedProgram, weights: Mapping[str, str]
) -> EdgeProgramManager:
    """Lower ``forward`` to XNNPACK and ``init`` to portable operators."""
    return to_edge_transform_and_lower(
        {"forward": forward, "init": init},
        partitioner={"forward": [_DynamicPartitioner({TOKEN, *weights})], "init": []},
    )


def check_state(program: ExportedProgram) -> None:
    """Refuse a lowered ``forward`` that has a state of its own.

    Raises:
        Unsupported: it would lie among the buffers, and ``init`` would have to set it.
    """
    for name in program.graph_signature.buffers_to_mutate.values():
        raise Unsupported(
            f"executorch: the model changes its buffer {name}, which init would have to set: "
            "set executorch.backend to another one"
        )


def uses(program: ExportedProgram, weights: Mapping[str, str]) -> Iterator[str]:
    """What instructions of the lowered ``forward`` take, in order: names of palettes, or TOKEN."""
    names = {**weights, TOKEN: TOKEN}
    buffers = program.graph_signature.inputs_to_buffers
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is _VIEW:
            continue  # a view is no instruction
        for source in pytree.tree_leaves((node.args, node.kwargs)):
            while isinstance(source, fx.Node) and source.target is _VIEW:
                source = source.args[0]
            if isinstance(source, fx.Node) and (name := buffers.get(source.name)) in names:
                yield names[name]


class _Planning(MemoryPlanningPass):  # type: ignore[misc]
    """Plans one decode at a time beside the buffers.

    ExecuTorch writes all buffers when a method ends, so that each weight would be kept until then,
    and plans once more memory for them as outputs.
    """

    def run(self, graph_module: fx.GraphModule, graph_signature: Any = None) -> Any:
        for copy in graph_module.graph.find_nodes(op="call_function", target=_COPY):
            buffer, source, *_ = copy.args
            if source.op != "placeholder":  # the token comes last
                source.append(copy)
            copy.meta["spec"] = buffer.meta["spec"]
        output = graph_module.graph.output_node()
        output.meta["spec"] = pytree.tree_map_only(
            fx.Node, lambda node: node.meta["spec"], output.args[0]
        )
        return super().run(graph_module, graph_signature)


def backend_config() -> ExecutorchBackendConfig:
    """For the emission of the methods, once: the planning has a state."""
    return ExecutorchBackendConfig(
        memory_planning_pass=_Planning(share_mutable_buffers=True), emit_mutable_buffer_names=True
    )
