"""Recipes: everything that `dkm compress` needs to know, in one TOML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from dkm_export.errors import InvalidInput
from dkm_export.palettized import ModelDescription, ModelSource
from dkm_export.parametrization import DkmSettings, Positive
from dkm_export.plugins import recipes
from dkm_export.references import TaskSource
from dkm_export.settings import parse_setting, read_toml
from dkm_export.spec import CompressionSpec, Frozen
from dkm_export.training.weights import CONFIG, WEIGHTS, read_config
from dkm_export.validation import explain

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ModelSection(ModelDescription):
    """The model.

    Attributes:
        weights: a safetensors file, or a state dict that torch reads with ``weights_only``; or,
            without a suffix, a folder as Hugging Face's, whose ``config.json`` becomes the
            factory's argument ``config``. None for the factory's own weights.
    """

    weights: Path | None = None


class TrainSection(Frozen):
    """One phase of training.

    Attributes:
        epochs: how often to go through the training split.
        batch_size: examples per step.
        accumulate: even parts in which a step computes its batch, one after another: less memory,
            and batch norm sees the parts.
        learning_rate: the highest one.
        schedule: how the learning rate falls to 0, after the warm-up.
        warmup_epochs: time in which the learning rate rises linearly.
        optimizer: ``adamw``, or ``sgd`` with momentum.
        momentum: of ``sgd``.
        weight_decay: decoupled from the gradient with ``adamw``, part of it with ``sgd``. Biases
            and norms do not decay.
        precision: of the model's forward pass; ``bfloat16`` is torch's autocast.
    """

    epochs: Annotated[int, Field(ge=0)]
    batch_size: Annotated[int, Field(ge=1)] = 64
    accumulate: Annotated[int, Field(ge=1)] = 1
    learning_rate: Positive = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_epochs: NotNegative = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _warm_in_time(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError("warmup_epochs is more than epochs")
        if self.accumulate > self.batch_size:
            raise ValueError("accumulate is more than batch_size")
        return self


class DkmSection(TrainSection, DkmSettings):
    """Fine-tuning with DKM; ``epochs = 0`` is post-training palettization.

    Attributes:
        tau: as in `DkmSettings`, of the first epoch.
        tau_end: of the last epoch, or the only one; in between it falls geometrically.
        distillation: share of the loss that compares with the float model's output, 0 to 1; the
            rest is the task's loss.
        distillation_temperature: softens the logits that are compared.
        keep: the epoch whose weights are the result: the one with the best metric of hard weights
            on the test split, or the last one.
        sensitivity_batches: training batches whose mean squared gradient says how much each
            weight counts for the initial centroids; with 0, all count the same.
        shard: several processes keep and cluster a part of each weight, instead of all of it.
    """

    tau: Positive = 0.2
    tau_end: Positive = 0.02
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0
    distillation_temperature: Positive = 2.0
    keep: Literal["best", "last"] = "best"
    sensitivity_batches: Annotated[int, Field(ge=0)] = 0
    shard: bool = False


class Recipe(Frozen):
    """A whole recipe.

    Attributes:
        seed: of initial weights, shuffling and initial centroids.
        task: a `dkm_export.Task`; needed for any training.
        train: float training before compression; left out for a model that has its weights.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    task: TaskSource | None = None
    model: ModelSection
    train: TrainSection | None = None
    dkm: DkmSection
    compression: CompressionSpec

    def source(self) -> ModelSource:
        """The part that a checkpoint keeps."""
        model = self.model.model_dump(exclude={"weights"})
        return ModelSource.model_validate({**model, "task": self.task})


def find_recipe(name: str) -> Path:
    """The file ``name``, or the recipe of this name in an installed package.

    Raises:
        InvalidInput: when there is neither.
    """
    path = Path(name)
    if path.suffix or path.exists():
        return path
    known = recipes()
    if name not in known:
        raise InvalidInput(
            f"'{name}' is no file and no recipe: name a .toml file or one of {', '.join(known)}"
        )
    return known[name]


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``key.path=value`` overrides, values written as in TOML.

    Raises:
        InvalidInput: when the file is missing or not TOML, or a key or value is wrong.
    """
    return as_recipe(read_recipe(path, overrides), path)


def as_recipe(data: Mapping[str, Any], path: Path) -> Recipe:
    """The recipe that ``data`` is, as `read_recipe` read it from ``path``.

    Raises:
        InvalidInput: when a key or value is wrong.
    """
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
    folder = recipe.model.weights
    if folder is None or folder.suffix:
        return recipe
    update = {
        "weights": folder / WEIGHTS,
        "arguments": {**recipe.model.arguments, "config": read_config(folder / CONFIG)},
    }
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=update)})


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The TOML of a recipe as it is, with ``overrides`` applied.

    Raises:
        InvalidInput: when the file is missing or not TOML, or an override is none.
    """
    data = read_toml(path)
    for override in overrides:
        _override(data, override)
    return data


def _override(data: dict[str, Any], text: str) -> None:
    path, value = parse_setting(text)
    table = data
    for part in path[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise InvalidInput(f"'{text}': '{part}' is not a table")
        table = inner
    table[path[-1]] = value
