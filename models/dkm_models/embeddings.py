"""A task without labels: sentences, and the embeddings that a pretrained encoder gives them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dkm_export.errors import InvalidInput
from dkm_export.task import Batch, Split, Task
from dkm_models.bert import pretrained_sentence_encoder
from dkm_models.text import Tokenizer, batches_from, read_sentences

_BATCH = 64
"""Sentences that the pretrained encoder takes at once."""


class EmbeddingDistillation(Task):
    """Learn the embeddings of a pretrained encoder: its own, for a compressed copy of it.

    A training sentence that is also a test sentence, word for word, is left out of the training.
    Files are read, and the encoder is run, once per split and when it is first asked for.

    Args:
        encoder: Hugging Face folder with ``config.json``, ``model.safetensors``, ``vocab.txt``.
        train: text files, one sentence per line.
        test: the same.
        length: tokens that every sentence is cut or padded to, markers included.

    Raises:
        InvalidInput: when a file is missing or wrong, or no training sentence is left.
    """

    metric_name = "cosine x100"

    def __init__(self, encoder: str, train: list[str], test: list[str], length: int = 64) -> None:
        for name, files in (("train", train), ("test", test)):
            if not isinstance(files, list) or not files:
                raise InvalidInput(f"task embeddings: '{name}' is {files!r}, not a list of files")
        self._encoder = Path(encoder)
        self._files = {"train": [Path(file) for file in train], "test": [Path(f) for f in test]}
        self._length = length
        self._encoded: dict[Split, tuple[Tensor, Tensor, Tensor]] = {}

    def size(self, split: Split) -> int:
        return len(self._split(split)[0])

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        token_ids, mask, target = self._split(split)
        return batches_from((token_ids, mask), target, batch_size, seed)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(output, target)).mean()

    def metric(self, output: Tensor, target: Tensor) -> float:
        return 100 * F.cosine_similarity(output.double(), target.double()).mean().item()

    def distillation(self, output: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """The loss; embeddings are no logits and have no temperature."""
        return self.loss(output, teacher)

    def _split(self, split: Split) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and masks, int32 ``[sentences, length]``, and embeddings."""
        if split not in self._encoded:
            tokenizer = Tokenizer(self._encoder, self._length)
            token_ids, mask, _ = tokenizer.encode(self._sentences(split))
            encoder = pretrained_sentence_encoder(self._encoder)
            with torch.no_grad():
                parts = zip(token_ids.split(_BATCH), mask.split(_BATCH), strict=True)
                target = torch.cat([encoder(*part) for part in parts])
            self._encoded[split] = token_ids, mask, target
        return self._encoded[split]

    def _sentences(self, split: Split) -> list[str]:
        sentences = read_sentences(self._files[split])
        if split == "test":
            return sentences
        tested = set(self._sentences("test"))
        left = [sentence for sentence in sentences if sentence not in tested]
        if not left:
            raise InvalidInput(
                "task embeddings: every sentence of 'train' is also in 'test': split them"
            )
        return left
