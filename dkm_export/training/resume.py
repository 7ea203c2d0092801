"""``RUN.resume.safetensors``: the state of a training that is not finished yet.

Tensors: ``model.<key>`` of the state dict, ``optimizer.<parameter>.<slot>``, and what else the
phase goes on from: ``best.<key>`` of the best epoch, ``teacher.<key>`` of the float model. The
header's metadata has one key, ``dkm-resume``, with a JSON object. Random numbers are not stored:
every epoch begins with its own seed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, FiniteFloat, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dkm_export.errors import InvalidInput
from dkm_export.files import sha256
from dkm_export.sharding import load
from dkm_export.spec import Frozen
from dkm_export.training.metrics import Epoch
from dkm_export.training.recipe import Recipe
from dkm_export.validation import explain

SUFFIX = ".resume.safetensors"
_KEY = "dkm-resume"
_MODEL, _OPTIMIZER = "model.", "optimizer."
_WAY_OUT = "pass --force to start over"

PhaseName = Literal["fp32", "dkm"]


class Standing(Frozen):
    """How far a run has come.

    Attributes:
        fingerprint: of the recipe and its weights, see `fingerprint`.
        phase: float training or fine-tuning with DKM.
        done: epochs of this phase.
        steps: per epoch; the learning rate follows from it.
        fp32: the metric before compression, once float training is over.
        epochs: of fine-tuning, as many as are done.
    """

    schema_version: Literal[1] = 1
    fingerprint: str
    phase: PhaseName
    done: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    fp32: FiniteFloat | None = None
    epochs: tuple[Epoch, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        tuning = self.phase == "dkm"
        if len(self.epochs) != (self.done if tuning else 0) or (self.fp32 is not None) != tuning:
            raise ValueError("the metrics are not those of the epochs that are done")
        return self


@dataclass(frozen=True)
class ResumeFile:
    """The file of one run, which need not be there.

    Attributes:
        path: ``RUN.resume.safetensors``.
    """

    path: Path

    @classmethod
    def beside(cls, output: Path) -> Self:
        """The file for a run that makes ``output``."""
        return cls(output.parent / f"{output.name}{SUFFIX}")

    def begin(self, *, resume: bool, force: bool) -> None:
        """Make sure before the training that this file may be written, and can be.

        Args:
            resume: go on from the file if it is there.
            force: without ``resume``, forget what is there.

        Raises:
            InvalidInput: when an unfinished run would be lost, or nothing can be written there.
        """
        if self.path.exists() and not resume and not force:
            raise InvalidInput(
                f"{self.path} holds an unfinished run: pass --resume to go on with it, or --force "
                "to start over"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._part.touch()
            self._part.unlink()
            if not resume:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise InvalidInput(f"cannot write {self.path}: {error.strerror}") from error

    def end(self) -> None:
        """The run is finished: remove the file."""
        self.path.unlink(missing_ok=True)

    def standing(self, recipe: Recipe) -> Standing | None:
        """What the file says about itself; None when there is none.

        Raises:
            InvalidInput: when it is damaged, or of another recipe or other weights.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise self._unusable(f"not a safetensors file, or cut short: {error}") from error
        if _KEY not in metadata:
            raise self._unusable(f"has no '{_KEY}' metadata, so `dkm compress` did not write it")
        try:
            standing = Standing.model_validate_json(metadata[_KEY])
        except ValidationError as error:
            raise self._unusable(explain(error, Standing)) from error
        if standing.fingerprint != fingerprint(recipe):
            raise InvalidInput(
                f"{self.path}: belongs to another recipe, seed or weights file: pass those it "
                "began with, or --force to start over"
            )
        section = recipe.train if standing.phase == "fp32" else recipe.dkm
        if section is None or standing.done > section.epochs:
            raise self._unusable(f"'done': the recipe has fewer than {standing.done} epochs")
        return standing

    def write(self, standing: Standing, state: Mapping[str, Tensor]) -> None:
        """Replace the file in one step: a run that is killed leaves the old one or the new one.

        Args:
            standing: how far the run has come.
            state: every tensor that a resumed run needs, whole, by its name in the file.

        Raises:
            InvalidInput: when it cannot be written.
        """
        # A copy each: safetensors does not take tensors that share memory, as tied weights do.
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in state.items()
        }
        try:
            save_file(tensors, self._part, metadata={_KEY: standing.model_dump_json()})
            with self._part.open("r+b") as written:
                os.fsync(written.fileno())  # or a power cut could leave the new name, but no bytes
            self._part.replace(self.path)
        except (SafetensorError, OSError) as error:
            raise InvalidInput(f"cannot write {self.path}: {error}") from error

    def restore(self, standing: Standing, steps: int, own: Mapping[str, Tensor]) -> None:
        """Load the file's tensors into ``own``, in place.

        Args:
            standing: the file's.
            steps: per epoch, as the task's data are now.
            own: the tensors that `write` was given, of today's run; parts of them, if sharded.

        Raises:
            InvalidInput: when the data have changed in size, or with the first tensor that is
                missing, unknown or of another shape or dtype.
        """
        if standing.steps != steps:
            raise self._unusable(
                f"'steps': an epoch had {standing.steps} steps and has {steps} with today's data"
            )
        try:
            with safe_open(self.path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.offset_keys()}
        except (SafetensorError, OSError) as error:
            raise self._unusable(f"not a safetensors file, or cut short: {error}") from error
        self._require_match(own, found)
        with torch.no_grad():
            for name, tensor in own.items():
                load(tensor, found[name])

    def _require_match(self, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        for name in sorted(own.keys() | found.keys()):
            if name not in found:
                raise self._unusable(f"tensor '{name}' is missing")
            if name not in own:
                raise self._unusable(f"tensor '{name}' is unknown")
            expected, actual = (
                f"{tensor.dtype}{list(tensor.shape)}" for tensor in (own[name], found[name])
            )
            if expected != actual:
                raise self._unusable(f"tensor '{name}' is {actual}, expected {expected}")

    def _unusable(self, reason: str) -> InvalidInput:
        return InvalidInput(f"{self.path}: {reason}: {_WAY_OUT}")

    @property
    def _part(self) -> Path:
        """What is being written; always the same name, so that no kill leaves a heap of them."""
        return self.path.with_name(f".{self.path.name}.part")


def fingerprint(recipe: Recipe) -> str:
    """Hex digest of everything that the recipe says, and of the bytes of its weights file."""
    weights = recipe.model.weights
    parts = [
        # the bytes decide, not the path to them
        recipe.model_dump_json(exclude={"model": {"weights"}}),
        "" if weights is None else sha256(weights),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that training changes by its name in the file, each tensor the model's own.

    Args:
        model: the bare one.
        optimizer: made by `make_optimizer`.
    """
    tensors = {f"{_MODEL}{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for slot, tensor in optimizer.state[parameter].items():
            tensors[f"{_OPTIMIZER}{name}.{slot}"] = tensor
    return tensors
