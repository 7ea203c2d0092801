"""Recipes: everything that `dkm compress` needs to know, in one TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from dkm_export.errors import InvalidInput
from dkm_export.palettized import ModelDescription, ModelSource
from dkm_export.parametrization import DkmSettings, Positive
from dkm_export.settings import parse_setting
from dkm_export.spec import CompressionSpec, Frozen
from dkm_export.validation import explain


class ModelSection(ModelDescription):
    """The model.

    Attributes:
        weights: a safetensors file, or a state dict that torch reads with ``weights_only``;
            relative to the recipe. None for the factory's own weights.
    """

    weights: Path | None = None


class TrainSection(Frozen):
    """One phase of training, with Adam and a learning rate that falls to 0 along a cosine.

    Attributes:
        epochs: how often to go through the training split.
        batch_size: examples per step.
        learning_rate: of the first step.
    """

    epochs: Annotated[int, Field(ge=0)]
    batch_size: Annotated[int, Field(ge=1)] = 64
    learning_rate: Positive = 1e-3


class DkmSection(TrainSection, DkmSettings):
    """Fine-tuning with DKM; ``epochs = 0`` is post-training palettization.

    Attributes:
        tau_end: ``tau`` falls geometrically from ``tau`` in the first epoch to this in the last.
        sensitivity_batches: training batches whose mean squared gradient says how much each
            weight counts for the initial centroids; with 0, all count the same.
        shard: several processes keep and cluster a part of each weight, instead of all of it.
    """

    tau_end: Positive = 0.05
    sensitivity_batches: Annotated[int, Field(ge=0)] = 0
    shard: bool = False


class Recipe(Frozen):
    """A whole recipe.

    Attributes:
        seed: of initial weights, shuffling and initial centroids.
        task: ``package.module:Class`` of a `dkm_export.Task`; needed for any training.
        train: float training before compression; left out for a model that has its weights.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    task: str | None = None
    model: ModelSection
    train: TrainSection | None = None
    dkm: DkmSection
    compression: CompressionSpec

    def source(self) -> ModelSource:
        """The part that a checkpoint keeps."""
        model = self.model.model_dump(exclude={"weights"})
        return ModelSource.model_validate({**model, "task": self.task})


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``key.path=value`` overrides, values written as in TOML.

    Raises:
        InvalidInput: when the file is missing or not TOML, or a key or value is wrong.
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not TOML: {error}") from error
    for override in overrides:
        _override(data, override)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise InvalidInput(f"{path}: {explain(error, Recipe)}") from error
    trains = (
        recipe.dkm.epochs
        or recipe.dkm.sensitivity_batches
        or (recipe.train and recipe.train.epochs)
    )
    if trains and recipe.task is None:
        raise InvalidInput(
            f"{path}: training needs a 'task', or epochs = 0 and sensitivity_batches = 0"
        )
    if recipe.model.weights is None:
        return recipe
    weights = path.parent / recipe.model.weights
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": weights})})


def _override(data: dict[str, Any], text: str) -> None:
    path, value = parse_setting(text)
    table = data
    for part in path[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise InvalidInput(f"'{text}': '{part}' is not a table")
        table = inner
    table[path[-1]] = value
