"""BERT and DistilBERT encoders in plain torch, with heads for sentences and for classes.

Both are post-layer-norm transformers with learned positions (Devlin et al., 2018, arXiv
1810.04805; Sanh et al., 2019, arXiv 1910.01108). They are made from Hugging Face's ``config.json``
and load its weights by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from torch import Tensor, nn

from dkm_export.errors import InvalidInput
from dkm_export.spec import Frozen
from dkm_export.training.weights import CONFIG, WEIGHTS, load_weights, read_config

_KEYS = {
    "bert": {
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "hidden": "intermediate_size",
        "vocabulary": "vocab_size",
        "positions": "max_position_embeddings",
        "segments": "type_vocab_size",
        "epsilon": "layer_norm_eps",
        "dropout": "hidden_dropout_prob",
    },
    "distilbert": {
        "width": "dim",
        "depth": "n_layers",
        "heads": "n_heads",
        "hidden": "hidden_dim",
        "vocabulary": "vocab_size",
        "positions": "max_position_embeddings",
        "dropout": "dropout",
    },
}
"""By model type: the fields of `EncoderConfig`, and their keys in ``config.json``."""

_ONLY = {
    # keys of both types; what we compute is also what a file without the key means
    "hidden_act": "gelu",
    "activation": "gelu",
    "position_embedding_type": "absolute",
}

_NAMES = {
    "bert": {
        "embeddings.word_embeddings": "encoder.embeddings.words",
        "embeddings.position_embeddings": "encoder.embeddings.positions",
        "embeddings.token_type_embeddings": "encoder.embeddings.segments",
        "embeddings.LayerNorm": "encoder.embeddings.norm",
        "encoder.layer.{}.attention.self.query": "encoder.layers.{}.attention.query",
        "encoder.layer.{}.attention.self.key": "encoder.layers.{}.attention.key",
        "encoder.layer.{}.attention.self.value": "encoder.layers.{}.attention.value",
        "encoder.layer.{}.attention.output.dense": "encoder.layers.{}.attention.output",
        "encoder.layer.{}.attention.output.LayerNorm": "encoder.layers.{}.attention_norm",
        "encoder.layer.{}.intermediate.dense": "encoder.layers.{}.hidden",
        "encoder.layer.{}.output.dense": "encoder.layers.{}.output",
        "encoder.layer.{}.output.LayerNorm": "encoder.layers.{}.output_norm",
        "pooler.dense": "pooler",
    },
    "distilbert": {
        "embeddings.word_embeddings": "encoder.embeddings.words",
        "embeddings.position_embeddings": "encoder.embeddings.positions",
        "embeddings.LayerNorm": "encoder.embeddings.norm",
        "transformer.layer.{}.attention.q_lin": "encoder.layers.{}.attention.query",
        "transformer.layer.{}.attention.k_lin": "encoder.layers.{}.attention.key",
        "transformer.layer.{}.attention.v_lin": "encoder.layers.{}.attention.value",
        "transformer.layer.{}.attention.out_lin": "encoder.layers.{}.attention.output",
        "transformer.layer.{}.sa_layer_norm": "encoder.layers.{}.attention_norm",
        "transformer.layer.{}.ffn.lin1": "encoder.layers.{}.hidden",
        "transformer.layer.{}.ffn.lin2": "encoder.layers.{}.output",
        "transformer.layer.{}.output_layer_norm": "encoder.layers.{}.output_norm",
        "pre_classifier": "pooler",
    },
}
"""By model type: Hugging Face's names of modules, and ours."""

_NO_WEIGHTS = ("embeddings.position_ids", "cls.", "vocab_")
"""Hugging Face's numbers of positions, and heads that guess masked words or next sentences."""

_MASKED = -1e4
"""Added to the scores of masked tokens: float16 holds it, and a row of nothing else is no NaN."""

_SMALLEST_NORM = 1e-4
"""Of an embedding: a normal number in float16, far below the norm of any sentence."""

Size = Annotated[int, Field(ge=1, strict=True)]


class EncoderConfig(Frozen):
    """What decides the shapes and the mathematics of an encoder.

    Attributes:
        model_type: ``bert`` or ``distilbert``.
        width: of a token's vector.
        depth: number of layers.
        heads: of each attention; they divide the width.
        hidden: width inside the feed-forward part of a layer.
        vocabulary: number of tokens.
        positions: most tokens of an input.
        segments: kinds of token type; 0 for an encoder that has none.
        epsilon: of the layer norms.
        dropout: share of zeros in training, wherever there is dropout.
    """

    model_type: str
    width: Size
    depth: Size
    heads: Size
    hidden: Size
    vocabulary: Size
    positions: Size
    segments: Annotated[int, Field(ge=0, strict=True)] = 0
    epsilon: Annotated[float, Field(gt=0)] = 1e-12
    dropout: Annotated[float, Field(ge=0, lt=1)]


class Encoder(nn.Module):
    """``[batch, length]`` token ids to ``[batch, length, width]`` vectors."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))

    def forward(self, token_ids: Tensor, mask: Tensor, segments: Tensor | None = None) -> Tensor:
        """Encode tokens.

        Args:
            token_ids: int32 or int64 ``[batch, length]``.
            mask: the same; 1 for tokens, 0 for padding.
            segments: the same, token types; None for zeros.

        Raises:
            InvalidInput: for more tokens than positions, or segments that the encoder has not.
        """
        x: Tensor = self.embeddings(token_ids, segments)
        bias = _MASKED * (1 - mask[:, None, None, :].to(x.dtype))
        for layer in self.layers:
            x = layer(x, bias)
        return x


class Embeddings(nn.Module):
    """The sum of what a token is, where it is and, in BERT, in which segment."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.segments = nn.Embedding(config.segments, config.width) if config.segments else None
        self.norm = nn.LayerNorm(config.width, config.epsilon)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, token_ids: Tensor, segments: Tensor | None) -> Tensor:
        length = token_ids.shape[1]
        if length > self.positions.num_embeddings:
            raise InvalidInput(
                f"{length} tokens are more than the encoder's {self.positions.num_embeddings} "
                "positions: shorten the model's inputs and the task's length"
            )
        x = self.words(token_ids) + self.positions(torch.arange(length, device=token_ids.device))
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(token_ids) if segments is None else segments)
        elif segments is not None:
            raise InvalidInput("a distilbert has no segments: leave out the third input")
        embedded: Tensor = self.dropout(self.norm(x))
        return embedded


class Layer(nn.Module):
    """Attention and a feed-forward part, each beside a shortcut and before a layer norm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.width, config.epsilon)
        self.hidden = nn.Linear(config.width, config.hidden)
        self.output = nn.Linear(config.hidden, config.width)
        self.output_norm = nn.LayerNorm(config.width, config.epsilon)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, bias)))
        output: Tensor = self.output_norm(x + self.dropout(self.output(F.gelu(self.hidden(x)))))
        return output


class Attention(nn.Module):
    """Every token looks at every other; ``bias``, ``[batch, 1, 1, length]``, says which count."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(query, key, value, bias, dropout)
        mixed: Tensor = self.output(seen.transpose(1, 2).flatten(2))
        return mixed


class SentenceEncoder(nn.Module):
    """Sentences to unit vectors: the mean over a sentence's tokens, normalized.

    Source: the pooling of sentence-transformers' all-MiniLM models.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Embed int32 or int64 ``[batch, length]`` tokens: ``[batch, width]``, of length 1.

        The mask is 1 for tokens and 0 for padding; nothing but padding gives zeros.
        """
        x: Tensor = self.encoder(token_ids, mask)
        kept = mask.to(x.dtype).unsqueeze(2)
        mean = (x * kept).sum(1) / kept.sum(1).clamp(min=1)
        return mean / mean.square().sum(1, keepdim=True).sqrt().clamp(min=_SMALLEST_NORM)

    def adapt_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state`` with our names, without BERT's pooler; unknown keys stay as they are."""
        renamed = _with_own_names(state, self.config)
        return {key: renamed[key] for key in renamed if not key.startswith("pooler.")}


class TextClassifier(nn.Module):
    """Texts to ``[batch, classes]`` logits, from the vector of the first token.

    The pooler's activation is tanh in BERT and ReLU in DistilBERT, as in Hugging Face's models.
    """

    def __init__(self, config: EncoderConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.pooler = nn.Linear(config.width, config.width)
        self.activation = nn.Tanh() if config.model_type == "bert" else nn.ReLU()
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.width, classes)

    def forward(self, token_ids: Tensor, mask: Tensor, segments: Tensor | None = None) -> Tensor:
        """Classify int32 or int64 ``[batch, length]`` tokens, as `Encoder` takes them."""
        first = self.encoder(token_ids, mask, segments)[:, 0]
        logits: Tensor = self.classifier(self.dropout(self.activation(self.pooler(first))))
        return logits

    def adapt_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state`` with our names; unknown keys stay, and a base model gets the head of now."""
        renamed = _with_own_names(state, self.config)
        if any(key.startswith("classifier.") for key in renamed):
            return renamed
        own = self.state_dict()
        head = {key: own[key] for key in own if key.startswith(("pooler.", "classifier."))}
        return head | renamed


def sentence_encoder(config: dict[str, Any]) -> SentenceEncoder:
    """An encoder of sentences, untrained and without dropout.

    Args:
        config: the object in Hugging Face's ``config.json``.

    Raises:
        InvalidInput: when ``config`` is none of a BERT or DistilBERT that is computed here.
    """
    return SentenceEncoder(_encoder_config({**config, "hidden_dropout_prob": 0.0, "dropout": 0.0}))


def text_classifier(config: dict[str, Any], classes: int) -> TextClassifier:
    """A classifier of texts, untrained.

    Args:
        config: the object in Hugging Face's ``config.json``.
        classes: number of logits; 1 for a regression.

    Raises:
        InvalidInput: as `sentence_encoder`.
    """
    return TextClassifier(_encoder_config(config), classes)


def pretrained_sentence_encoder(folder: Path) -> SentenceEncoder:
    """The encoder of sentences in a Hugging Face folder, in eval mode.

    Raises:
        InvalidInput: when ``config.json`` or ``model.safetensors`` is missing or wrong.
    """
    config = read_config(folder / CONFIG)
    try:
        model = sentence_encoder(config)
    except InvalidInput as error:
        raise InvalidInput(f"{folder / CONFIG}: {error}") from error
    load_weights(model, folder / WEIGHTS, "the sentence encoder")
    return model.eval()


def _encoder_config(config: Mapping[str, Any]) -> EncoderConfig:
    model_type = config.get("model_type")
    if model_type not in ("bert", "distilbert"):
        raise InvalidInput(f"config: model_type is {model_type!r}, allowed: {', '.join(_KEYS)}")
    for key, value in _ONLY.items():
        if config.get(key, value) != value:
            raise InvalidInput(f"config: {key} is {config[key]!r}, only '{value}' is computed here")
    keys = _KEYS[model_type]
    missing = [key for key in keys.values() if key not in config]
    if missing:
        raise InvalidInput(f"config: {missing[0]} is missing, a {model_type} needs it")
    values = {name: config[key] for name, key in keys.items()}
    try:
        read = EncoderConfig(model_type=model_type, **values)
    except ValidationError as error:
        finding = error.errors()[0]
        key = keys[str(finding["loc"][0])]
        raise InvalidInput(f"config: {key} is {config[key]!r}: {finding['msg']}") from error
    if read.width % read.heads:
        raise InvalidInput(
            f"config: {keys['width']} {read.width} is no multiple of {keys['heads']} {read.heads}"
        )
    return read


def _with_own_names(state: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Hugging Face's names, with or without their prefix, replaced by ours."""
    own = {
        theirs.format(layer): ours.format(layer)
        for theirs, ours in _NAMES[config.model_type].items()
        for layer in range(config.depth)
    }
    renamed = {}
    for key, tensor in state.items():
        bare = key.removeprefix(f"{config.model_type}.")
        module, _, parameter = bare.rpartition(".")
        if not bare.startswith(_NO_WEIGHTS):
            renamed[f"{own[module]}.{parameter}" if module in own else key] = tensor
    return renamed
