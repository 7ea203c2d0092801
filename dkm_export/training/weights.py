"""Weights to start from: files as torch and Hugging Face's libraries write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dkm_export.errors import InvalidInput
from dkm_export.palettized import load_state
from dkm_export.task import user_code

# Names of the files in a folder of Hugging Face's layout.
CONFIG = "config.json"
WEIGHTS = "model.safetensors"

_PARALLEL = "module."
"""Before every name that torch's DataParallel has saved."""


@runtime_checkable
class AdaptsState(Protocol):
    """A model that can load state dicts with other names than its own."""

    def adapt_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state`` with this model's names.

        Keys that it does not know stay, so that an error can name them. What a file may lack, such
        as the head of a classifier, is filled in from the model's own state dict.
        """


def load_weights(model: nn.Module, path: Path, owner: str) -> None:
    """Load a file into ``model``, every key of it and of the model.

    float16 and bfloat16 become float32 where the model's are. Counters of batch norm, which old
    files lack, may be missing.

    Args:
        model: may be an `AdaptsState`.
        path: a safetensors file, or a state dict that torch reads with ``weights_only``.
        owner: names the model in errors.

    Raises:
        InvalidInput: when the file is missing, no state dict, or does not fit the model.
    """
    state = _read(path)
    if isinstance(model, AdaptsState):
        with user_code(f"{path}: adapt_state of {owner}"):
            state = model.adapt_state(state)
    own = model.state_dict()
    counters = {key: own[key] for key in own if key.endswith(".num_batches_tracked")}
    fitting = {key: _widened(tensor, own.get(key)) for key, tensor in state.items()}
    load_state(model, counters | fitting, f"{path}: {owner}")


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a ``config.json``.

    Raises:
        InvalidInput: when the file is missing or holds something else.
    """
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidInput(
            f"{path}: {error.strerror}: name a folder with {CONFIG} and {WEIGHTS}, as Hugging "
            "Face has them"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidInput(f"{path}: holds no JSON object")
    return config


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InvalidInput(f"{path}: no such file: name yours with model.weights") from error
    except UnpicklingError as error:
        raise InvalidInput(
            f"{path}: holds more than tensors, and unpickling it could run code: "
            "save the state dict as safetensors"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidInput(
            f"{path}: neither safetensors nor a plain state dict: {reason}"
        ) from error
    # Training scripts save it beside the optimizer's.
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise InvalidInput(f"{path}: holds no plain state dict of tensors by name")
    if all(name.startswith(_PARALLEL) for name in state):
        return {name.removeprefix(_PARALLEL): tensor for name, tensor in state.items()}
    return state


def _widened(tensor: Tensor, own: Tensor | None) -> Tensor:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if half and own is not None and own.dtype == torch.float32 else tensor
