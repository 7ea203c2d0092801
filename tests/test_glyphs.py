from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.task import Split
from dkm_models.glyphs import CHARACTERS, FONTS, Glyphs, glyphs_cnn

pytest.importorskip("PIL", reason="part of the extra 'models'")
pytest.importorskip("matplotlib", reason="part of the extra 'models'")


@pytest.fixture(scope="module")
def task() -> Glyphs:
    return Glyphs()


def whole(task: Glyphs, split: Split, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """All images and labels of a split."""
    ((images,), labels) = next(task.batches(split, task.size(split), seed))
    return images, labels


def test_no_font_is_in_both_splits() -> None:
    train, test = (set(FONTS[split]) for split in ("train", "test"))
    assert (len(train), len(test)) == (len(FONTS["train"]), len(FONTS["test"])) == (17, 4)
    assert all("STIX" not in name for name in train)
    assert all("STIX" in name for name in test)


def test_every_font_draws_every_character(task: Glyphs) -> None:
    for drawn in task._drawn.values():
        assert (drawn.min().item(), drawn.max().item()) == (0, 1)
        for font in drawn:
            assert len(font.flatten(1).unique(dim=0)) == len(CHARACTERS)
        ink = drawn > 0.5
        assert ink.flatten(2).sum(2).min() > 40
        assert not ink[..., [0, -1]].any()  # nothing is cut off
        assert not ink[..., [0, -1], :].any()
        tops = ink.any(3).byte().argmax(2)
        capital, small = (tops[:, [CHARACTERS.index(x) for x in xs]] for xs in ("HIZ", "xvz"))
        assert capital.min() == capital.max()  # sizes tell o from O
        assert (small > capital + 4).all()


def test_the_splits_are_balanced_and_large_enough(task: Glyphs) -> None:
    assert (task.size("train"), task.size("test")) == (9_300, 6_200)
    for images, labels in (whole(task, "train", 3), whole(task, "test")):
        assert images.shape == (len(labels), 1, 28, 28)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert set(labels.bincount().tolist()) == {len(labels) // 62}
        assert 0.5 < images.abs().max() < 2
        assert abs(images.mean()) < 0.05  # as many are dark as are light
        assert images.flatten(1).std(1).min() > 0.02


def test_the_seed_alone_decides(task: Glyphs) -> None:
    before = torch.get_rng_state()
    images, labels = whole(task, "train", 7)
    again, same = whole(Glyphs(), "train", 7)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    assert torch.equal(torch.get_rng_state(), before)
    other, shuffled = whole(task, "train", 8)
    assert not torch.equal(labels, shuffled)
    number = labels.argsort(stable=True), shuffled.argsort(stable=True)
    assert not (images[number[0]] == other[number[1]]).flatten(1).all(1).any()
    assert torch.equal(whole(task, "test")[0], whole(task, "test")[0])


@pytest.mark.parametrize("size", [1, 100, 256])
def test_the_size_of_batches_changes_no_image(task: Glyphs, size: int) -> None:
    """`dkm check` takes the test images one by one, the training stage many at once."""
    images, labels = whole(task, "test")
    for number, ((batch,), target) in zip(range(8), task.batches("test", size), strict=False):
        assert torch.equal(batch, images[number * size :][:size])
        assert torch.equal(target, labels[number * size :][:size])


def test_the_network_is_mostly_large_layers() -> None:
    model = glyphs_cnn().eval()
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 62)
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert sum(sizes) == 234_726
    assert sum(size for size in sizes if size >= 10_000) > 0.99 * sum(sizes)


def test_a_font_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FONTS, "test", ("Papyrus",))
    with pytest.raises(InvalidInput, match=r"Papyrus.ttf: .* needs a matplotlib that carries"):
        next(Glyphs().batches("test", 1))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Unsupported, match="the glyphs task: matplotlib not installed: pip install"):
        next(Glyphs().batches("test", 1))
