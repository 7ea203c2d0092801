"""The nine tasks of GLUE on local files (Wang et al., 2018, arXiv 1804.07461)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dkm_export.errors import InvalidInput
from dkm_export.task import Batch, Split, Task
from dkm_models.correlation import pearson, spearman
from dkm_models.text import Tokenizer, batches_from, read_lines

_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_HIGHEST_SCORE = 5


@dataclass(frozen=True)
class _Benchmark:
    """How one task's files look, and what it is measured by.

    Attributes:
        columns: of the original files: one text or two, then the label.
        fields: the same in Hugging Face's data sets.
        labels: the original ones, in the order of the classes; none for scores from 0 to 5.
        metric_name: what ``measure`` gives.
        measure: of predicted and true classes, or scores.
        header: of original files that have none.
        ragged: whether original files have a few broken rows, which everybody leaves out.
    """

    columns: tuple[str, ...]
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    metric_name: str
    measure: Callable[[Tensor, Tensor], float]
    header: tuple[str, ...] | None = None
    ragged: bool = False


def _accuracy(predicted: Tensor, true: Tensor) -> float:
    return 100 * (predicted == true).double().mean().item()


def _accuracy_and_f1(predicted: Tensor, true: Tensor) -> float:
    """Mean of both; F1 of class 1, and 0 when it is neither true nor predicted anywhere."""
    positives = (predicted.sum() + true.sum()).item()
    f1 = 2 * (predicted * true).sum().item() / positives if positives else 0.0
    return (_accuracy(predicted, true) + 100 * f1) / 2


def _correlation(predicted: Tensor, true: Tensor) -> float:
    return 50 * (pearson(predicted, true) + spearman(predicted, true))


def _matthews(predicted: Tensor, true: Tensor) -> float:
    """Of two classes, the Matthews coefficient is the linear correlation."""
    return 100 * pearson(predicted, true)


_BENCHMARKS = {
    "cola": _Benchmark(
        ("sentence", "label"),
        ("sentence", "label"),
        _BINARY,
        "Matthews x100",
        _matthews,
        header=("source", "label", "note", "sentence"),
    ),
    "sst2": _Benchmark(
        ("sentence", "label"), ("sentence", "label"), _BINARY, "accuracy %", _accuracy
    ),
    "mrpc": _Benchmark(
        ("#1 String", "#2 String", "Quality"),
        ("sentence1", "sentence2", "label"),
        _BINARY,
        "accuracy and F1 x100",
        _accuracy_and_f1,
    ),
    "qqp": _Benchmark(
        ("question1", "question2", "is_duplicate"),
        ("question1", "question2", "label"),
        _BINARY,
        "accuracy and F1 x100",
        _accuracy_and_f1,
        ragged=True,
    ),
    "stsb": _Benchmark(
        ("sentence1", "sentence2", "score"),
        ("sentence1", "sentence2", "label"),
        (),
        "Pearson and Spearman x100",
        _correlation,
    ),
    "mnli": _Benchmark(
        ("sentence1", "sentence2", "gold_label"),
        ("premise", "hypothesis", "label"),
        ("entailment", "neutral", "contradiction"),
        "accuracy %",
        _accuracy,
    ),
    "qnli": _Benchmark(
        ("question", "sentence", "label"),
        ("question", "sentence", "label"),
        _ENTAILMENT,
        "accuracy %",
        _accuracy,
    ),
    "rte": _Benchmark(
        ("sentence1", "sentence2", "label"),
        ("sentence1", "sentence2", "label"),
        _ENTAILMENT,
        "accuracy %",
        _accuracy,
    ),
    "wnli": _Benchmark(
        ("sentence1", "sentence2", "label"),
        ("sentence1", "sentence2", "label"),
        _BINARY,
        "accuracy %",
        _accuracy,
    ),
}

_FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train.tsv", "train.jsonl"),
    "test": ("dev.tsv", "dev.jsonl", "validation.jsonl"),
}
"""GLUE's original files, and Hugging Face's data sets; the first that is there is read."""


class Glue(Task):
    """One of GLUE's tasks; the test split is the development set, as test labels are not public.

    Files are read and tokenized once per split, when it is first asked for.

    Args:
        name: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli.
        folder: with GLUE's original ``train.tsv`` and ``dev.tsv``, or ``train.jsonl`` and
            ``dev.jsonl`` (or ``validation.jsonl``) with the fields of Hugging Face's data set;
            for mnli ``dev_matched`` (or ``validation_matched``).
        encoder: Hugging Face folder of the model or its vocabulary, see `Tokenizer`.
        length: tokens that every text or pair is cut or padded to, markers included.
        segments: whether the model takes token types as a third input, as BERT should for pairs.

    Raises:
        InvalidInput: when the name, a file, or the number of the model's outputs is wrong.
    """

    def __init__(
        self, name: str, folder: str, encoder: str, length: int = 128, segments: bool = False
    ) -> None:
        if name not in _BENCHMARKS:
            raise InvalidInput(f"task glue: no '{name}': choose from {', '.join(_BENCHMARKS)}")
        self._name = name
        self._benchmark = _BENCHMARKS[name]
        self.metric_name = self._benchmark.metric_name
        self._folder = Path(folder)
        self._encoder = Path(encoder)
        self._length = length
        self._inputs = 3 if segments else 2
        self._encoded: dict[Split, tuple[tuple[Tensor, ...], Tensor]] = {}

    def size(self, split: Split) -> int:
        return len(self._split(split)[1])

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        inputs, target = self._split(split)
        return batches_from(inputs, target, batch_size, seed)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        self._check(output)
        if self._benchmark.labels:
            return F.cross_entropy(output, target)
        return F.mse_loss(output[:, 0], target)

    def metric(self, output: Tensor, target: Tensor) -> float:
        self._check(output)
        predicted = output.argmax(1) if self._benchmark.labels else output[:, 0]
        return self._benchmark.measure(predicted, target)

    def distillation(self, output: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """As for every task; for scores, which have no temperature, the mean squared error."""
        if self._benchmark.labels:
            return super().distillation(output, teacher, temperature)
        return F.mse_loss(output, teacher)

    def _check(self, output: Tensor) -> None:
        outputs = len(self._benchmark.labels) or 1
        if output.shape[1:] != (outputs,):
            raise InvalidInput(
                f"task glue: the model's output is {list(output.shape)}, but '{self._name}' needs "
                f"[batch, {outputs}]: give the factory classes = {outputs}"
            )

    def _split(self, split: Split) -> tuple[tuple[Tensor, ...], Tensor]:
        if split not in self._encoded:
            texts, target = _read(self._file(split), self._benchmark)
            encoded = Tokenizer(self._encoder, self._length).encode(*texts)
            self._encoded[split] = encoded[: self._inputs], target
        return self._encoded[split]

    def _file(self, split: Split) -> Path:
        if not self._folder.is_dir():
            raise InvalidInput(f"{self._folder}: no such folder: put the files of GLUE there")
        names = _FILES[split]
        if self._name == "mnli" and split == "test":
            names = tuple(name.replace(".", "_matched.") for name in names)
        for name in names:
            if (self._folder / name).is_file():
                return self._folder / name
        raise InvalidInput(f"{self._folder}: '{self._name}' needs {' or '.join(names)} there")


def _read(file: Path, benchmark: _Benchmark) -> tuple[list[list[str]], Tensor]:
    """The texts of a file, a list for each of a pair, and int64 classes or float32 scores."""
    read = _read_tsv if file.suffix == ".tsv" else _read_jsonl
    rows, targets = [], []
    for number, (*texts, label) in read(file, benchmark):
        rows.append(texts)
        targets.append(_target(label, benchmark.labels, f"{file}: line {number}"))
    if not rows:
        raise InvalidInput(f"{file}: holds no examples")
    dtype = torch.int64 if benchmark.labels else torch.float32
    return [list(column) for column in zip(*rows, strict=True)], torch.tensor(targets, dtype=dtype)


def _read_tsv(file: Path, benchmark: _Benchmark) -> Iterator[tuple[int, list[str]]]:
    """Numbers of lines, and their texts and label; quotes are part of a text."""
    lines = enumerate(read_lines(file), 1)
    header = benchmark.header or next(lines, (1, ""))[1].split("\t")
    missing = [column for column in benchmark.columns if column not in header]
    if missing:
        raise InvalidInput(
            f"{file}: line 1: no column '{missing[0]}' in {', '.join(header)}: "
            "take GLUE's original file"
        )
    places = [header.index(column) for column in benchmark.columns]
    for number, line in lines:
        row = line.split("\t")
        if max(places) < len(row):
            yield number, [row[place] for place in places]
        elif not benchmark.ragged:
            raise InvalidInput(
                f"{file}: line {number} has {len(row)} columns, expected {len(header)}: "
                f"{', '.join(header)}"
            )


def _read_jsonl(file: Path, benchmark: _Benchmark) -> Iterator[tuple[int, list[Any]]]:
    """Numbers of lines, and their texts and label."""
    for number, line in enumerate(read_lines(file), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{file}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InvalidInput(f"{file}: line {number} is no JSON object")
        for field in benchmark.fields:
            if field not in row:
                raise InvalidInput(
                    f"{file}: line {number} has no field '{field}': "
                    f"{', '.join(benchmark.fields)} are needed"
                )
        *texts, label = (row[field] for field in benchmark.fields)
        for field, text in zip(benchmark.fields, texts, strict=False):
            if not isinstance(text, str):
                raise InvalidInput(f"{file}: line {number}: '{field}' is {text!r}, not a text")
        yield number, [*texts, label]


def _target(label: Any, labels: tuple[str, ...], where: str) -> float:
    """A class by name or number, or a score."""
    if not labels:
        try:
            score = float(label)
        except (TypeError, ValueError):
            score = math.nan
        if not 0 <= score <= _HIGHEST_SCORE:
            raise InvalidInput(f"{where}: score {label!r}, allowed: 0 to {_HIGHEST_SCORE}")
        return score
    if label in labels:
        return labels.index(label)
    if type(label) is int and 0 <= label < len(labels):
        return label
    raise InvalidInput(f"{where}: label {label!r}, allowed: {', '.join(labels)}")
