from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.task import metric_of
from dkm_export.training.recipe import load_recipe
from dkm_export.training.stage import evaluate, run_recipe
from dkm_models.bert import pretrained_sentence_encoder, text_classifier
from dkm_models.correlation import pearson, similarity_correlation, spearman
from dkm_models.embeddings import EmbeddingDistillation
from dkm_models.glue import Glue
from dkm_models.text import Tokenizer, read_lines, read_sentences
from tests.test_bert import base_of, config_of

pytest.importorskip("tokenizers", reason="part of the extra 'models'")

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##believ", "##able", "!"]
VOCABULARY += ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "Cat", "cafe", "café"]
VOCABULARY += [f"word{number}" for number in range(64 - len(VOCABULARY))]
NUMBER = {token: number for number, token in enumerate(VOCABULARY)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small BERT in Hugging Face's layout."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config_of("bert")))
    save_file(base_of("bert"), folder / "model.safetensors")
    return folder


def numbers(text: str) -> list[int]:
    return [NUMBER[token] for token in text.split()]


# Tokens


def test_texts_are_cut_and_padded(folder: Path) -> None:
    token_ids, mask, segments = Tokenizer(folder, 6).encode(
        ["The CAT!", "unbelievable", "the cat sat on the mat", "", "a zebra"]
    )
    assert token_ids.tolist() == [
        numbers("[CLS] the cat ! [SEP] [PAD]"),
        numbers("[CLS] un ##believ ##able [SEP] [PAD]"),
        numbers("[CLS] the cat sat on [SEP]"),
        numbers("[CLS] [SEP] [PAD] [PAD] [PAD] [PAD]"),
        numbers("[CLS] a [UNK] [SEP] [PAD] [PAD]"),
    ]
    assert torch.equal(mask, (token_ids != 0).int())
    assert not segments.any()
    assert {tensor.dtype for tensor in (token_ids, mask, segments)} == {torch.int32}


def test_of_pairs_the_longer_is_cut_first(folder: Path) -> None:
    tokenizer = Tokenizer(folder / "vocab.txt", 9)
    token_ids, mask, segments = tokenizer.encode(
        ["the cat sat on a mat", "a dog", "a dog"],
        ["dog ran", "the dog ran on the mat", "the dog ran"],
    )
    assert token_ids.tolist() == [
        numbers("[CLS] the cat sat on [SEP] dog ran [SEP]"),
        numbers("[CLS] a dog [SEP] the dog ran on [SEP]"),
        numbers("[CLS] a dog [SEP] the dog ran [SEP] [PAD]"),
    ]
    assert mask.tolist() == [[1] * 9, [1] * 9, [1] * 8 + [0]]
    assert segments.tolist() == [[0] * 6 + [1] * 3, [0] * 4 + [1] * 5, [0] * 4 + [1] * 4 + [0]]


def test_many_texts_stay_in_order(folder: Path) -> None:
    words = [f"word{number % 40}" for number in range(2500)]
    token_ids, _, _ = Tokenizer(folder, 5).encode(words)
    assert token_ids[:, 1].tolist() == [NUMBER[word] for word in words]


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, "cat cafe"),
        ({"do_lower_case": True, "strip_accents": None}, "cat cafe"),
        ({"do_lower_case": True, "strip_accents": False}, "cat café"),
        ({"do_lower_case": False}, "Cat café"),
    ],
)
def test_normalization_is_the_folder_s(folder: Path, settings: dict[str, Any], tokens: str) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    token_ids, _, _ = Tokenizer(folder, 5).encode(["Cat café"])
    assert token_ids[0, 1:3].tolist() == numbers(tokens)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.txt", None, r"vocab.txt: no such vocabulary: name a folder with vocab.txt"),
        ("vocab.txt", "", r"vocab.txt: \[PAD\], \[UNK\], \[CLS\], \[SEP\] missing"),
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\na", r"vocab.txt: \[SEP\] missing: it is no vocabulary"),
        ("vocab.txt", "[PAD]\n\na", r"vocab.txt: line 2 holds no token"),
        ("vocab.txt", "[PAD]\na\nb\na", r"vocab.txt: line 4 repeats the token 'a' of line 2"),
        ("vocab.txt", b"[PAD]\n\xff", r"vocab.txt: not UTF-8 at byte 6: save it as UTF-8"),
        (
            "config.json",
            '{"vocab_size": 65}',
            r"vocab.txt: 64 tokens, but vocab_size in .*config.json is 65",
        ),
        ("config.json", "[", r"config.json: not JSON"),
        ("tokenizer_config.json", '{"do_lower_case": 1}', r"'do_lower_case' is 1, allowed: true"),
    ],
)
def test_folders_without_a_vocabulary(
    folder: Path, file: str, content: str | bytes | None, message: str
) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InvalidInput, match=message):
        Tokenizer(folder, 8)


def test_a_length_that_holds_no_pair(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="length 4 is too short for texts, allowed: 5 up"):
        Tokenizer(folder, 4)


def test_without_tokenizers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(Unsupported, match=r"tokenizers not installed: pip install .*\[models\]"):
        Tokenizer(folder, 8)


def test_lines_end_where_files_say(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_bytes("\ufeffone\u2028still one\r\n \r\ntwo \nthree".encode())
    assert read_lines(file) == ["one\u2028still one", " ", "two ", "three"]
    assert read_sentences([file, file]) == ["one\u2028still one", "two", "three"] * 2
    file.write_text(" \n\n")
    with pytest.raises(InvalidInput, match=r"lines.txt: holds no sentences: write one per line"):
        read_sentences([file])
    with pytest.raises(InvalidInput, match=r"none.txt: No such file or directory"):
        read_sentences([tmp_path / "none.txt"])


# GLUE

ORIGINAL = {
    "cola": "x1\t1\t\tthe cat\nx1\t0\t*\tcat the\n",
    "sst2": "sentence\tlabel\nthe cat\t1\ncat the\t0\n",
    "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tthe cat\ta mat\n"
    '0\t7\t8\tcat the\t"a mat\n',
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t1\t2\tthe cat\ta mat\t1\n"
    '2\t1\n3\t1\t2\tcat the\t"a mat\t0\n',
    "stsb": "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\tthe cat\ta mat\t5.000\n"
    '1\tx\tcat the\t"a mat\t2.5\n',
    "mnli": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tthe cat\ta mat\tneutral\tneutral\n"
    '1\tcat the\t"a mat\tneutral\tcontradiction\n',
    "qnli": "index\tquestion\tsentence\tlabel\n0\tthe cat\ta mat\tnot_entailment\n"
    '1\tcat the\t"a mat\tentailment\n',
    "rte": "index\tsentence1\tsentence2\tlabel\n0\tthe cat\ta mat\tnot_entailment\n"
    '1\tcat the\t"a mat\tentailment\n',
    "wnli": 'index\tsentence1\tsentence2\tlabel\n0\tthe cat\ta mat\t1\n1\tcat the\t"a mat\t0\n',
}
PAIR = ("sentence1", "sentence2")
FIELDS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": PAIR,
    "qqp": ("question1", "question2"),
    "stsb": PAIR,
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": PAIR,
    "wnli": PAIR,
}
TARGETS: dict[str, list[float]] = {
    **{name: [1, 0] for name in FIELDS},
    "stsb": [5.0, 2.5],
    "mnli": [1, 2],
}
METRICS = {
    **dict.fromkeys(FIELDS, "accuracy %"),
    "cola": "Matthews x100",
    "mrpc": "accuracy and F1 x100",
    "qqp": "accuracy and F1 x100",
    "stsb": "Pearson and Spearman x100",
}


def glue(folder: Path, name: str, file: str, content: str, **settings: Any) -> Glue:
    data = folder.parent / name
    data.mkdir(exist_ok=True)
    (data / file).write_text(content, encoding="utf-8")
    return Glue(name, str(data), str(folder), length=10, **settings)


def lines_of(rows: Sequence[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("original", [True, False])
def test_both_kinds_of_files(folder: Path, name: str, original: bool) -> None:
    columns = [["the cat", "cat the"], ["a mat", '"a mat']][: len(FIELDS[name])]
    suffix = "_matched" if name == "mnli" else ""
    if original:
        task = glue(folder, name, f"dev{suffix}.tsv", ORIGINAL[name], segments=True)
    else:
        keys = (*FIELDS[name], "label")
        values = zip(*columns, TARGETS[name], strict=True)
        rows = [dict(zip(keys, row, strict=True)) for row in values]
        task = glue(folder, name, f"validation{suffix}.jsonl", lines_of(rows), segments=True)
    assert (task.metric_name, task.size("test")) == (METRICS[name], 2)
    ((inputs, target),) = task.batches("test", 8)
    assert target.tolist() == TARGETS[name]
    assert target.dtype == (torch.float32 if name == "stsb" else torch.int64)
    for ours, theirs in zip(inputs, Tokenizer(folder, 10).encode(*columns), strict=True):
        assert torch.equal(ours, theirs)


def test_batches_are_fixed_or_shuffled(folder: Path) -> None:
    rows = [{"sentence": f"word{number}", "label": number % 2} for number in range(20)]
    task = glue(folder, "sst2", "train.jsonl", lines_of(rows))
    batches = list(task.batches("train", 8))
    assert [len(target) for _, target in batches] == [8, 8, 4]
    assert [len(inputs) for inputs, _ in batches] == [2, 2, 2]
    assert torch.cat([target for _, target in batches]).tolist() == [0, 1] * 10
    ((token_ids, _), labels), *_ = task.batches("train", 20, seed=1)
    again, *_ = task.batches("train", 20, seed=1)
    assert torch.equal(token_ids, again[0][0])
    shuffled = token_ids[:, 1] - NUMBER["word0"]
    assert shuffled.tolist() != list(range(20))
    assert sorted(shuffled.tolist()) == list(range(20))
    assert torch.equal(shuffled % 2, labels)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("sst2", "other.tsv", "", r"sst2: 'sst2' needs dev.tsv or dev.jsonl or validation.jsonl"),
        ("mnli", "dev.tsv", "", r"mnli: 'mnli' needs dev_matched.tsv or dev_matched.jsonl"),
        ("sst2", "dev.tsv", "text\tlabel\n", r"line 1: no column 'sentence' in text, label: take"),
        ("sst2", "dev.tsv", "", r"dev.tsv: line 1: no column 'sentence'"),
        ("cola", "dev.tsv", "", r"dev.tsv: holds no examples"),
        ("sst2", "dev.tsv", "sentence\tlabel\n", r"dev.tsv: holds no examples"),
        (
            "sst2",
            "dev.tsv",
            "sentence\tlabel\na\t1\nb\n",
            r"dev.tsv: line 3 has 1 columns, expected 2: sentence, label",
        ),
        ("cola", "dev.tsv", "x\t2\t\ta", r"dev.tsv: line 1: label '2', allowed: 0, 1"),
        (
            "rte",
            "dev.tsv",
            "sentence1\tsentence2\tlabel\na\tb\t1\n",
            r"dev.tsv: line 2: label '1', allowed: entailment, not_entailment",
        ),
        (
            "stsb",
            "dev.tsv",
            "sentence1\tsentence2\tscore\na\tb\tnan\n",
            r"dev.tsv: line 2: score 'nan', allowed: 0 to 5",
        ),
        ("stsb", "dev.jsonl", lines_of([dict.fromkeys((*PAIR, "label"), "a")]), r"score 'a'"),
        ("sst2", "dev.jsonl", "{", r"dev.jsonl: line 1 is not JSON: Expecting"),
        ("sst2", "dev.jsonl", "[]", r"dev.jsonl: line 1 is no JSON object"),
        (
            "sst2",
            "dev.jsonl",
            '{"sentence": "a", "label": 0}\n{"sentence": "a"}',
            r"dev.jsonl: line 2 has no field 'label': sentence, label are needed",
        ),
        (
            "sst2",
            "dev.jsonl",
            '{"sentence": null, "label": 0}',
            r"line 1: 'sentence' is None, not a text",
        ),
        (
            "sst2",
            "dev.jsonl",
            '{"sentence": "a", "label": -1}',
            r"line 1: label -1, allowed: 0, 1",
        ),
        (
            "sst2",
            "dev.jsonl",
            '{"sentence": "a", "label": true}',
            r"line 1: label True, allowed: 0, 1",
        ),
    ],
)
def test_files_that_are_not_glue_s(
    folder: Path, name: str, file: str, content: str, message: str
) -> None:
    task = glue(folder, name, file, content)
    with pytest.raises(InvalidInput, match=message):
        task.size("test")


def test_tasks_and_folders_that_are_none(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="no 'sst-2': choose from cola, sst2, mrpc"):
        Glue("sst-2", "data", str(folder))
    with pytest.raises(InvalidInput, match="nowhere: no such folder: put the files of GLUE there"):
        Glue("sst2", str(folder / "nowhere"), str(folder)).size("train")


def random_classes(classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    target = torch.randint(classes, (200,), generator=generator)
    noise = torch.randn(200, classes, generator=generator)
    return noise + torch.nn.functional.one_hot(target), target


def test_metrics_are_the_official_ones() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="part of the extra 'models'")
    stats = pytest.importorskip("scipy.stats", reason="part of the extra 'models'")
    output, target = random_classes(2)
    predicted = output.argmax(1)
    accuracy = metrics.accuracy_score(target, predicted)
    f1 = metrics.f1_score(target, predicted)
    matthews = metrics.matthews_corrcoef(target, predicted)
    assert 0.5 < accuracy < 0.95
    scores = (target + output[:, 0]).round()  # with ties
    pearson_r = stats.pearsonr(output[:, 1], scores).statistic
    spearman_r = stats.spearmanr(output[:, 1], scores).statistic
    for name, given, true, expected in (
        ("sst2", output, target, 100 * accuracy),
        ("mrpc", output, target, 50 * (accuracy + f1)),
        ("cola", output, target, 100 * matthews),
        ("stsb", output[:, 1:], scores, 50 * (pearson_r + spearman_r)),
    ):
        assert metric_of(Glue(name, "", ""), given, true) == pytest.approx(expected)


def test_metrics_of_one_example_are_numbers() -> None:
    for name in FIELDS:
        outputs = {"stsb": 1, "mnli": 3}.get(name, 2)
        target = torch.zeros(1, dtype=torch.float32 if name == "stsb" else torch.int64)
        metric_of(Glue(name, "", ""), torch.ones(1, outputs), target)


def test_losses() -> None:
    output, target = random_classes(2)
    task = Glue("rte", "", "")
    expected = torch.nn.functional.cross_entropy(output, target)
    assert torch.equal(task.loss(output, target), expected)
    assert task.distillation(output, output, 2.0).item() == pytest.approx(0, abs=1e-6)
    scores = Glue("stsb", "", "")
    one, goal = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 4.0])
    assert scores.loss(one, goal).item() == 2
    assert scores.distillation(one, goal[:, None], 3.0).item() == 2
    with pytest.raises(InvalidInput, match=r"output is \[200, 2\], but 'stsb' needs \[batch, 1\]"):
        scores.loss(output, target)
    with pytest.raises(InvalidInput, match=r"'mnli' needs \[batch, 3\]: give .* classes = 3"):
        Glue("mnli", "", "").metric(output, target)


def test_a_classifier_learns_a_task(folder: Path) -> None:
    rows = [
        {"premise": f"word{a}", "hypothesis": f"word{b}", "label": int(a >= 20)}
        for a in range(40)
        for b in range(5)
    ]
    task = glue(folder, "mnli", "dev_matched.jsonl", lines_of(rows), segments=True)
    torch.manual_seed(0)
    model = text_classifier(config_of("bert", max_position_embeddings=12), 3)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for seed in range(25):
        for inputs, target in task.batches("test", 50, seed):
            optimizer.zero_grad()
            task.loss(model(*inputs), target).backward()
            optimizer.step()
    assert evaluate(model.eval(), task) > 95


# Embeddings


@pytest.fixture
def sentences(folder: Path) -> tuple[str, str]:
    """Training and test sentences, one of which is in both."""
    train, test = folder.parent / "train.txt", folder.parent / "test.txt"
    train.write_text("".join(f"the word{n} word{n + 1}\n\n" for n in range(40)) + "a dog\n")
    test.write_text("a dog\n" + "".join(f"a word{n} cat word{3 * n}\n" for n in range(15)))
    return str(train), str(test)


def test_the_original_agrees_with_itself(folder: Path, sentences: tuple[str, str]) -> None:
    task = EmbeddingDistillation(str(folder), [sentences[0]], [sentences[1]], length=8)
    assert (task.size("train"), task.size("test")) == (40, 16)
    encoder = pretrained_sentence_encoder(folder)
    assert evaluate(encoder, task) == pytest.approx(100)
    (token_ids, mask), target = next(task.batches("test", 16))
    assert torch.equal(target, encoder(token_ids, mask))
    assert not target.requires_grad
    assert task.loss(target, target).item() == pytest.approx(0, abs=1e-6)
    assert task.loss(-target, target).item() == pytest.approx(2)
    assert task.distillation(-target, target, 4.0).item() == pytest.approx(2)


def test_sentences_that_are_not_there(folder: Path, sentences: tuple[str, str]) -> None:
    with pytest.raises(InvalidInput, match=r"'train' is 'x.txt', not a list of files"):
        EmbeddingDistillation(str(folder), "x.txt", ["y.txt"])  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"'test' is \[\], not a list of files"):
        EmbeddingDistillation(str(folder), ["x.txt"], [])
    same = EmbeddingDistillation(str(folder), [sentences[1]], [sentences[1]])
    with pytest.raises(InvalidInput, match="every sentence of 'train' is also in 'test'"):
        same.size("train")
    missing = EmbeddingDistillation(str(folder), ["none.txt"], [sentences[1]])
    with pytest.raises(InvalidInput, match=r"none.txt: No such file"):
        missing.size("train")
    long = EmbeddingDistillation(str(folder), [sentences[0]], [sentences[1]], length=13)
    with pytest.raises(InvalidInput, match="13 tokens are more than the encoder's 12 positions"):
        long.size("test")


def test_compressed_encoders_learn_from_the_original(
    folder: Path, sentences: tuple[str, str]
) -> None:
    recipe = folder.parent / "recipe.toml"
    recipe.write_text(
        f"""
        [task]
        factory = "dkm_models.embeddings:EmbeddingDistillation"
        [task.arguments]
        encoder = "{folder}"
        train = ["{sentences[0]}"]
        test = ["{sentences[1]}"]
        length = 8
        [model]
        name = "encoder"
        factory = "dkm_models.bert:sentence_encoder"
        weights = "{folder}"
        inputs = [
            {{ name = "token_ids", shape = [1, 8], dtype = "int32", high = 64 }},
            {{ name = "mask", shape = [1, 8], dtype = "int32", high = 2 }},
        ]
        [dkm]
        epochs = 4
        batch_size = 8
        [compression]
        rules = [{{ bits = 2 }}]
        small_layer_size = 0
        """
    )
    _, trained = run_recipe(load_recipe(recipe), lambda *_: None)
    _, untrained = run_recipe(load_recipe(recipe, ["dkm.epochs=0"]), lambda *_: None)
    assert trained.metric == "cosine x100"
    assert trained.fp32 == pytest.approx(100)
    assert trained.hard is not None
    assert untrained.hard is not None
    assert untrained.hard < trained.hard < 100


def test_correlations() -> None:
    assert spearman(
        torch.tensor([1, 2, 3, 4]), torch.tensor([1.0, 10, 100, 1000])
    ) == pytest.approx(1)
    assert spearman(torch.tensor([1, 2, 3]), torch.tensor([3, 2, 1])) == pytest.approx(-1)
    # ranks 1.5, 1.5, 3 against 1, 2, 3
    assert spearman(torch.tensor([1, 1, 3]), torch.tensor([1, 2, 3])) == pytest.approx(0.75**0.5)
    assert pearson(torch.tensor([1.0, 2, 4]), torch.tensor([3.0, 5, 9])) == pytest.approx(1)
    assert pearson(torch.ones(3), torch.tensor([1.0, 2, 3])) == 0


def test_similarities_do_not_depend_on_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(12, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    assert similarity_correlation(embeddings, 3 * embeddings @ rotation) == pytest.approx(1)
    other = torch.randn(12, 4, generator=generator)
    similarities = [
        torch.stack(
            [
                torch.nn.functional.cosine_similarity(each[a], each[b], dim=0)
                for a in range(12)
                for b in range(a)
            ]
        )
        for each in (embeddings, other)
    ]
    expected = spearman(*similarities)
    assert abs(expected) < 0.5
    assert similarity_correlation(embeddings, other) == pytest.approx(expected)
