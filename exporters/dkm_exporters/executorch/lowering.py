"""From a module and its palettes to the bytes of a ``.pte`` file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig, to_edge
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map_only

from dkm_export.entry import PaletteEntry
from dkm_export.errors import DkmError, InvalidInput, Unsupported
from dkm_export.folding import fold_batch_norm
from dkm_export.palettized import ModelSource, PalettizedModel
from dkm_exporters.executorch import two_methods
from dkm_exporters.executorch.header import INPUTS_METHOD, PALETTES_METHOD, Header
from dkm_exporters.executorch.options import WEIGHTS_SUFFIX, ExecuTorchOptions
from dkm_exporters.executorch.weights import Weights
from dkm_exporters.executorch.weights_file import WeightsFile
from dkm_exporters.executorch.xnnpack import delegate, delegates, exchange, take_out


def lower(
    module: nn.Module, model: PalettizedModel, options: ExecuTorchOptions
) -> dict[str, bytes]:
    """Lower ``module``, which is changed, to a program.

    Returns:
        Contents of files by their suffix: the program, and what it needs beside it.

    Raises:
        Unsupported: when a library cannot express the model, no stock kernel runs an operator, or
            the model does not use a palette.
        InvalidInput: when the model returns another number of outputs than its source names.
    """
    lowered = _Lowering(module, model, options).run()
    header = Header(
        backend=options.backend,
        precision=options.computes_in,
        layers={name: PaletteEntry.of(palette) for name, palette in model.palettes.items()},
        decodes=tuple(lowered.decodes),
        buffers=tuple(lowered.buffers),
    )
    _check_decoded(header)
    edge = lowered.edge
    with _explained("ExecuTorch"):
        program = EdgeProgramManager(
            {name: edge.exported_program(name) for name in sorted(edge.methods)},
            {
                PALETTES_METHOD: header.model_dump_json(),
                INPUTS_METHOD: [spec.name for spec in model.source.inputs],
            },
            edge.compile_config,
        ).to_executorch(lowered.config)
    _check_operators(program.executorch_program)
    return {".pte": bytes(program.buffer), **lowered.files}


@dataclass
class _Lowered:
    """A model in the instructions of its backend.

    Attributes:
        edge: its methods.
        decodes: the parameters of each decode, in the order in which methods run.
        buffers: what ``forward`` takes that ``init`` has decoded, see `Header`.
        files: contents by suffix of what is beside the program.
        config: how to emit it.
    """

    edge: EdgeProgramManager
    decodes: Iterable[tuple[str, ...]]
    buffers: Iterable[str] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    config: ExecutorchBackendConfig = field(default_factory=ExecutorchBackendConfig)


class _Lowering:
    """One model on its way to one backend."""

    def __init__(
        self, module: nn.Module, model: PalettizedModel, options: ExecuTorchOptions
    ) -> None:
        self._module, self._model, self._options = module, model, options
        self._inputs = _example_inputs(model.source, options)

    def run(self) -> _Lowered:
        """Lower to the backend of the options."""
        if self._options.backend == "coreml":
            return self._coreml()
        _check_layers(self._module)
        palettes = fold_batch_norm(
            self._module, self._model.palettes, self._inputs, self._model.ties
        )
        if self._options.computes_in == "fp16":
            _halve(self._module)
        weights = Weights(self._module, palettes, self._model.ties)
        weights.decode_rows()
        match self._options.backend:
            case "portable":
                return self._portable(weights)
            case "xnnpack-init":
                return self._two_methods(weights)
        return self._xnnpack(weights)

    def _portable(self, weights: Weights) -> _Lowered:
        weights.decode(weights.palettes)
        with _explained("ExecuTorch"):
            edge = to_edge(self._export())
        return _Lowered(edge, weights.decodes(edge.exported_program()))

    def _xnnpack(self, weights: Weights) -> _Lowered:
        with _explained("ExecuTorch"):
            edge, packed = delegate(self._export, weights, self._options.computes_in)
        program, files = edge.exported_program(), {}
        if self._options.backend == "xnnpack-ptd":
            take_out(program, packed.blobs)
            files[WEIGHTS_SUFFIX] = WeightsFile.of(packed.blobs).to_bytes()
        else:
            exchange(program, packed.blobs)
        return _Lowered(edge, weights.decodes(program, packed.of_part), files=files)

    def _two_methods(self, weights: Weights) -> _Lowered:
        two_methods.hold(self._module, weights.owners, weights.palettes)
        exported = self._export()
        held = two_methods.held(exported, weights.owners)
        with _explained("ExecuTorch"):
            init = two_methods.export_init(held, weights.palettes)
            edge = two_methods.to_two_methods(exported, init, held)
        program = edge.exported_program()
        two_methods.check_state(program)
        return _Lowered(
            edge,
            [*((name,) for name in held.values()), *weights.decodes(program)],
            two_methods.uses(program, held),
            config=two_methods.backend_config(),
        )

    def _coreml(self) -> _Lowered:
        """Batch norms stay, as a palette times a scale is none to Core ML."""
        # It imports coremltools, which takes seconds and is there on some systems only.
        from dkm_exporters.executorch.coreml import finish, to_coreml, use_constexpr
        from dkm_exporters.executorch.ml_programs import read_part

        palettes, precision = self._model.palettes, self._options.computes_in
        for name, owner in Weights(self._module, palettes, self._model.ties).owners.items():
            use_constexpr(self._module, name, palettes[owner], owner)
        with _explained("the Core ML delegate"):
            edge = to_coreml(self._export(), precision)
        program = edge.exported_program()
        finish(program, palettes, precision)
        parts = (part for _, part in delegates(program))
        names = [name for part in parts for name in read_part(part.processed_bytes, "it")]
        return _Lowered(edge, [(name,) for name in names])

    def _export(self) -> ExportedProgram:
        """The module as it is now."""
        batch = None
        if self._options.max_batch is not None:
            size = Dim("batch", max=self._options.max_batch)
            batch = tuple({0: size} for _ in self._inputs)
        with _explained("torch.export"):
            program = torch.export.export(self._module, self._inputs, dynamic_shapes=batch)
            # A layer that only looks at its weight leaves a decode that would not reach the end.
            program.graph.eliminate_dead_code()
        _check_outputs(program, self._model.source)
        return program


def _halve(module: nn.Module) -> None:
    """Let a module compute in float16 between inputs and outputs of float32, in place."""
    forward = module.half().forward

    @wraps(forward)
    def halved(*inputs: Tensor) -> Any:
        outputs = forward(*(x.half() if x.is_floating_point() else x for x in inputs))
        return tree_map_only(Tensor, lambda y: y.float() if y.is_floating_point() else y, outputs)

    module.forward = halved


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


@contextmanager
def _explained(library: str) -> Iterator[None]:
    """Turn whatever the library raises over a model into one line."""
    try:
        yield
    except DkmError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        heading, *rest = lines or [type(error).__name__]
        reason = " ".join([heading, *rest[:1]] if heading.endswith(":") else [heading])
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
            name = f"{operator.name}.{operator.overload}".removesuffix(".")
            if name not in stock:
                raise Unsupported(
                    f"executorch: no stock kernel runs {name}; rewrite that part of the model"
                )
