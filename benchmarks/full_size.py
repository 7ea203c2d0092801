"""Networks at full size whose artifacts are measured on runtimes; images are 224x224."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.minilm import TEST_PACKAGES, sentences
from benchmarks.networks import before_palettizing, minilm_folder, without_data
from dkm_export import PalettizedModel
from dkm_export.training.stage import run_recipe
from dkm_models.text import Tokenizer

LENGTH = 128
"""Tokens of a text."""

_FOLDED = "model.batch_norm=fold-before-training"


@dataclass(frozen=True)
class Network:
    """A network before and after it was palettized.

    Attributes:
        module: before, in eval mode.
        model: after.
        samples: what goes in.
        config: bits/dim, and what else a reader should know.
    """

    module: nn.Module
    model: PalettizedModel
    samples: Sequence[tuple[Tensor, ...]]
    config: str


def palettized(name: str, config: str, settings: Sequence[str] = ()) -> Network:
    """By a recipe, with random weights."""
    recipe = without_data(name, settings)
    model, _ = run_recipe(recipe, lambda *status: None)
    generator = torch.Generator().manual_seed(1)
    samples = [tuple(spec.random(generator) for spec in model.source.inputs) for _ in range(4)]
    return Network(before_palettizing(recipe), model, samples, f"{config}, random weights")


def _minilm() -> Network:
    folder, bits = minilm_folder(), "4/1"
    inputs = ",".join(
        f"{{name='{name}',shape=[1,{LENGTH}],dtype='int32',high={high}}}"
        for name, high in (("token_ids", 30522), ("mask", 2))
    )
    settings = [f"model.inputs=[{inputs}]", "compression.rules=[{bits=4}]"]
    if folder is None:
        return palettized("sentence_encoder", bits, settings)
    recipe = without_data("sentence_encoder", settings, folder)
    model, _ = run_recipe(recipe, lambda *status: None)
    prose = sentences(TEST_PACKAGES, 64)
    texts = [" ".join(prose[start : start + 16]) for start in range(0, len(prose), 16)]
    token_ids, mask, _ = Tokenizer(folder, LENGTH).encode(texts)
    samples = list(zip(token_ids[:, None], mask[:, None], strict=True))
    return Network(before_palettizing(recipe), model, samples, f"{bits}, real weights")


FULL_SIZE: Mapping[str, Callable[[], Network]] = {
    "MobileNet-v1": lambda: palettized("mobilenet_v1_random", "conv 4/4, fc 4/2", [_FOLDED]),
    "ResNet-50": lambda: palettized("resnet50_imagenet", "conv 6/6, fc 6/4", [_FOLDED]),
    "MiniLM": _minilm,
    "DistilBERT": lambda: palettized("distilbert_glue", "linear 3/1, embeddings 2/1"),
}
