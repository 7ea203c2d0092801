"""A palettized model: the seam between training, which makes it, and exporters, which read it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, StringConstraints, model_validator
from torch import Tensor, nn

from dkm_export.errors import InvalidInput
from dkm_export.folding import fold_like
from dkm_export.palette import Palette
from dkm_export.references import TaskSource, build_module
from dkm_export.spec import CompressionSpec, Frozen
from dkm_export.task import Task, size_of

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=100)]
"""An identifier that is safe as a file name and as a generated Swift or Kotlin name."""

BatchNorm = Literal["separate", "fold-before-training"]
"""What becomes of batch norm, see `ModelDescription`."""

_HALF = (torch.float16, torch.bfloat16)

_MOST_VALUES = 2**28
"""Of one input: 1 GiB of float32. Shapes come from files, and memory is made for them."""


class InputSpec(Frozen):
    """One input of the model.

    Attributes:
        name: its name in every artifact.
        shape: its fixed shape; axis 0 is the batch.
        dtype: float32, or int32 / int64 for token ids and the like.
        high: for integers, one more than the largest allowed value.
    """

    name: Name
    shape: Annotated[
        tuple[Annotated[int, Field(ge=1, le=_MOST_VALUES, strict=True)], ...],
        Field(min_length=1, max_length=8),
    ]
    dtype: Literal["float32", "int32", "int64"] = "float32"
    high: Annotated[int, Field(ge=1, lt=2**31, strict=True)] | None = None

    @model_validator(mode="after")
    def _bound_for_integers(self) -> Self:
        if (self.dtype == "float32") == (self.high is not None):
            raise ValueError("'high' goes with integer inputs, and only with them")
        if math.prod(self.shape) > _MOST_VALUES:
            raise ValueError(f"an input has at most {_MOST_VALUES:,} values")
        return self

    def problem(self, tensor: Tensor) -> str | None:
        """What is wrong with an input that should be this one; None when it fits."""
        found = f"{tensor.dtype}{list(tensor.shape)}"
        expected = f"torch.{self.dtype}{list(self.shape)}"
        if found != expected:
            return f"input '{self.name}' is {found}, expected {expected}"
        if self.high is not None and not bool(((tensor >= 0) & (tensor < self.high)).all()):
            lowest, highest = int(tensor.min()), int(tensor.max())
            return (
                f"input '{self.name}' holds {lowest} to {highest}, allowed are 0 to "
                f"{self.high - 1}: give the vocabulary that the model was trained with"
            )
        return None

    def random(self, generator: torch.Generator) -> Tensor:
        """A random input: integers below ``high``, or normal numbers of a random scale and offset.

        Networks that average over positions hardly tell one plain noise image from another.
        """
        if self.high is None:
            gain = 0.5 + torch.rand((), generator=generator)
            offset = torch.randn((), generator=generator)
            return gain * torch.randn(self.shape, generator=generator) + offset
        dtype = getattr(torch, self.dtype)
        return torch.randint(self.high, self.shape, generator=generator, dtype=dtype)


class ModelDescription(Frozen):
    """A model's code, and what goes in and out of it.

    Attributes:
        name: names the artifacts: ``coreml/<name>.mlpackage``.
        factory: ``package.module:callable`` that returns the ``nn.Module``.
        arguments: keyword arguments for the factory, plain JSON values.
        inputs: in the order of ``forward``'s parameters.
        outputs: names of the outputs, in the order that ``forward`` returns them.
        batch_norm: ``separate`` keeps it as an operation of its own; with ``fold-before-training``
            it is a part of the layer before it, see `dkm_export.folding.fold_before_training`.
    """

    name: Name
    factory: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    inputs: Annotated[tuple[InputSpec, ...], Field(min_length=1)]
    outputs: Annotated[tuple[Name, ...], Field(min_length=1)] = ("output",)
    batch_norm: BatchNorm = "separate"

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Inputs to trace the model with, always the same."""
        generator = torch.Generator().manual_seed(0)
        return tuple(spec.random(generator) for spec in self.inputs)

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [*(spec.name for spec in self.inputs), *self.outputs]
        if len(set(names)) < len(names):
            raise ValueError(f"input and output names repeat: {', '.join(names)}")
        return self


class ModelSource(ModelDescription):
    """How to build a palettized model's code again.

    Attributes:
        task: what it was trained for, if anything.
    """

    task: TaskSource | None = None

    def load_task(self, data: Mapping[str, Any] | None) -> Task | None:
        """The task, if there is one, on this machine.

        Args:
            data: arguments of the task that are others here, such as where its data are; with
                None, do without the task.

        Raises:
            InvalidInput: when the task does not import, fails or does not find its data.
        """
        if self.task is None or data is None:
            return None
        here = {**self.task.arguments, **data}
        try:
            task = TaskSource(factory=self.task.factory, arguments=here).load()
            size_of(task, "test")  # reads what tasks read late
            return task
        except InvalidInput as error:
            raise InvalidInput(
                f"{error}: say where the task's data are with --data KEY=VALUE, or do without them "
                "with --no-data"
            ) from error


@dataclass(frozen=True, eq=False)
class PalettizedModel:
    """A model whose weights are palettes, plus everything that stayed dense.

    Attributes:
        source: how to build the module that the weights belong to.
        spec: the rules that made the palettes.
        palettes: by full parameter name (``features.0.weight``).
        dense: the rest of the state dict: biases, batch norm, layers left alone.
        ties: names of parameters that are another one of ``palettes``, with its name.
        metrics: the task's metric where it was measured: ``fp32`` before, ``hard`` after.
        sha256: of the checkpoint that this was read from, or an empty string.
    """

    source: ModelSource
    spec: CompressionSpec
    palettes: Mapping[str, Palette]
    dense: Mapping[str, Tensor]
    metrics: Mapping[str, float] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""

    def __post_init__(self) -> None:
        names = [*self.palettes, *self.dense, *self.ties]
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise InvalidInput(f"{twice[0]} is more than one of palette, dense tensor and tie")
        for name, owner in self.ties.items():
            if owner not in self.palettes:
                raise InvalidInput(f"{name} is tied to {owner}, which is no palette")

    def build(self) -> nn.Module:
        """The PyTorch reference: the model in eval mode with every palette decoded to float32.

        Raises:
            InvalidInput: when the factory's model does not have these parameters and shapes.
        """
        module = build_module(self.source.factory, self.source.arguments)
        # Half-precision weights are deployed from their float16 LUTs like all others.
        if any(tensor.dtype in _HALF for tensor in module.state_dict().values()):
            module.float()
        state = self.state_dict()
        if self.source.batch_norm == "fold-before-training":
            fold_like(module, state)
        load_state(module, state, f"the model of '{self.source.factory}'")
        # A factory may leave it to the training to tie weights.
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name in self.ties.keys() & parameters.keys():
            path, _, key = name.rpartition(".")
            setattr(module.get_submodule(path), key, parameters[self.ties[name]])
        return module.eval().requires_grad_(False)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state dict, palettes decoded."""
        decoded = {name: torch.from_numpy(p.dense()) for name, p in self.palettes.items()}
        return {**self.dense, **decoded, **{name: decoded[own] for name, own in self.ties.items()}}

    @property
    def fp32_bytes(self) -> int:
        """Size of all weights and buffers at their uncompressed precision."""
        dense = sum(tensor.nbytes for tensor in self.dense.values())
        return dense + sum(4 * math.prod(p.layout.shape) for p in self.palettes.values())


def load_state(module: nn.Module, state: Mapping[str, Tensor], owner: str) -> None:
    """Load ``state`` into ``module``; keys, shapes and dtypes must match exactly.

    Raises:
        InvalidInput: with the first keys that are missing, unknown or of another shape or dtype.
    """
    own = module.state_dict()
    for problem, keys in (
        ("does not have", sorted(state.keys() - own.keys())),
        ("misses weights for", sorted(own.keys() - state.keys())),
        (
            "has another shape for",
            [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape],
        ),
        (
            "has another dtype for",
            [key for key in own.keys() & state.keys() if own[key].dtype != state[key].dtype],
        ),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise InvalidInput(f"{owner} {problem} {', '.join(sorted(keys)[:3])}{more}")
    module.load_state_dict(dict(state))
