"""Texts: reading them from files, and WordPiece tokens as BERT's models take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.plugins import missing_packages
from dkm_export.task import Batch
from dkm_export.training.weights import CONFIG, read_config

VOCABULARY = "vocab.txt"
_SETTINGS = "tokenizer_config.json"

_NORMALIZATION = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}
"""Keys of ``tokenizer_config.json``; the tokenizer's arguments and their defaults."""

_MARKERS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")

_SHORTEST = 5
"""Tokens: the three markers of a pair, and one of each text."""

_CHUNK = 1024
"""Texts that are tokenized at once: what the library makes of each takes kilobytes."""


class Tokenizer:
    """BERT's tokens, from a Hugging Face folder or a vocabulary.

    Args:
        path: a folder with ``vocab.txt``, or such a file, one token per line. Beside it,
            ``tokenizer_config.json`` says how text is normalized (without it: to lower case), and
            ``config.json`` how many tokens the model knows.
        length: tokens that every text is cut or padded to, markers included.

    Raises:
        InvalidInput: when the vocabulary is missing, is none, or is not the model's.
        Unsupported: without the ``tokenizers`` package.
    """

    def __init__(self, path: Path, length: int) -> None:
        missing = missing_packages(("tokenizers",), "models")
        if missing:
            raise Unsupported(f"tokens of texts: {missing}")
        from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

        if length < _SHORTEST:
            raise InvalidInput(f"length {length} is too short for texts, allowed: {_SHORTEST} up")
        file = path / VOCABULARY if path.is_dir() else path
        vocabulary = _read_vocabulary(file)
        self._tokenizer = BertWordPieceTokenizer(vocabulary, **_normalization(file))
        self._tokenizer.enable_truncation(length, strategy="longest_first")
        self._tokenizer.enable_padding(length=length, pad_id=vocabulary["[PAD]"])

    def encode(
        self, texts: Sequence[str], second: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of texts, or of their pairs with ``second``, the longer of which is cut first.

        Returns:
            Token ids, mask (0 for padding) and segments (1 for the second text), each int32
            ``[texts, length]``.
        """
        inputs: list[Any] = list(texts if second is None else zip(texts, second, strict=True))
        chunks = []
        for start in range(0, len(inputs), _CHUNK):
            encodings = self._tokenizer.encode_batch(inputs[start : start + _CHUNK])
            rows = [(each.ids, each.attention_mask, each.type_ids) for each in encodings]
            chunks.append(torch.tensor(rows, dtype=torch.int32))
        token_ids, mask, segments = torch.cat(chunks).unbind(1)
        return token_ids, mask, segments


def read_lines(path: Path) -> list[str]:
    r"""Lines of a UTF-8 file, without their ends: ``\n``, ``\r\n`` or ``\r``.

    Raises:
        InvalidInput: when the file is missing or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows puts a mark before the text
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from error
    # str.splitlines() would also split at characters that texts and vocabularies contain.
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def read_sentences(paths: Sequence[Path]) -> list[str]:
    """The sentences of text files, one per line; blank lines are none.

    Raises:
        InvalidInput: when a file is missing, not UTF-8, or holds no sentence.
    """
    sentences = []
    for path in paths:
        found = [line.strip() for line in read_lines(path) if line.strip()]
        if not found:
            raise InvalidInput(f"{path}: holds no sentences: write one per line")
        sentences += found
    return sentences


def batches_from(
    inputs: Sequence[Tensor], target: Tensor, batch_size: int, seed: int | None
) -> Iterator[Batch]:
    """Cut tensors of equally many examples into a task's batches, shuffled if there is a seed."""
    order = torch.arange(len(target))
    if seed is not None:
        order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    for chosen in order.split(batch_size):
        yield tuple(tensor[chosen] for tensor in inputs), target[chosen]


def _read_vocabulary(file: Path) -> dict[str, int]:
    """The tokens of a vocabulary and their numbers."""
    if not file.is_file():
        raise InvalidInput(f"{file}: no such vocabulary: name a folder with {VOCABULARY} or a file")
    tokens = read_lines(file)
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if not token:
            raise InvalidInput(f"{file}: line {number + 1} holds no token")
        if token in vocabulary:
            raise InvalidInput(
                f"{file}: line {number + 1} repeats the token '{token}' of line "
                f"{vocabulary[token] + 1}"
            )
        vocabulary[token] = number
    missing = [marker for marker in _MARKERS if marker not in vocabulary]
    if missing:
        raise InvalidInput(f"{file}: {', '.join(missing)} missing: it is no vocabulary of a BERT")
    config = file.with_name(CONFIG)
    size = read_config(config).get("vocab_size") if config.is_file() else len(tokens)
    if size != len(tokens):
        raise InvalidInput(
            f"{file}: {len(tokens)} tokens, but vocab_size in {config} is {size}: "
            "take both from one model"
        )
    return vocabulary


def _normalization(vocabulary: Path) -> dict[str, Any]:
    """Arguments of the tokenizer, from the settings beside a vocabulary."""
    file = vocabulary.with_name(_SETTINGS)
    settings = read_config(file) if file.is_file() else {}
    arguments = {}
    for key, (argument, default) in _NORMALIZATION.items():
        value = settings.get(key, default)
        if not isinstance(value, bool | None):
            raise InvalidInput(f"{file}: '{key}' is {value!r}, allowed: true, false")
        arguments[argument] = value
    return arguments
