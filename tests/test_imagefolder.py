from __future__ import annotations

import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.task import Split, batches_of, size_of
from dkm_models.imagefolder import ImageFolder

Image = pytest.importorskip("PIL.Image", reason="part of the extra 'models'")

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, with four images of noise each for training and three for the test."""
    for name in ("dog", "cat"):
        for split, count in (("train", 4), ("val", 3)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise(number + 10 * (name == "dog"), (50, 36)).save(folder / f"{number}.png")
    return tmp_path / "images"


def noise(seed: int, size: tuple[int, int]) -> Any:
    pixels = numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), numpy.uint8)
    return Image.fromarray(pixels)


def whole(task: ImageFolder, split: Split, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """All images and labels of a split, in batches of three."""
    batches = list(batches_of(task, split, 3, seed))
    return torch.cat([images for (images,), _ in batches]), torch.cat([y for _, y in batches])


def test_classes_are_numbered_by_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole(ImageFolder(str(root), 16), "test")[0]
    (root / "train" / "dog" / ".DS_Store").write_bytes(b"no image")
    (root / "train" / "notes.txt").write_text("no class")
    (root / "train" / ".cache").mkdir()
    listed = sorted(root.rglob("*"), reverse=True)  # file systems have orders of their own
    monkeypatch.setattr(
        Path, "iterdir", lambda folder: (path for path in listed if path.parent == folder)
    )
    task = ImageFolder(str(root), 16)
    assert (size_of(task, "train"), size_of(task, "test")) == (8, 6)
    images, labels = whole(task, "test")
    assert torch.equal(images, expected)
    assert (images.dtype, images.shape) == (torch.float32, (6, 3, 16, 16))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    shuffled = whole(task, "train", seed=1)[1]
    assert shuffled.tolist() != sorted(shuffled.tolist()) == [0] * 4 + [1] * 4


def test_a_test_image_is_the_middle_of_a_smaller_one(root: Path) -> None:
    image = noise(0, (50, 36)).resize((44, 32), Image.Resampling.BILINEAR)  # 28 * 256 / 224 is 32
    expected = torch.from_numpy(numpy.array(image.crop((8, 2, 36, 30)))).permute(2, 0, 1) / 255
    result = whole(ImageFolder(str(root), 28), "test")[0][0]
    pixels = result * torch.tensor(DEVIATION).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    torch.testing.assert_close(pixels, expected)


def test_crops_of_training_keep_to_their_limits(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (400, 300)).save(root / "train" / "cat" / "0.png")
    Image.new("RGB", (400, 4)).save(root / "train" / "cat" / "1.png")
    crops: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    crop = Image.Image.crop

    def remember(image: Any, box: tuple[int, int, int, int]) -> Any:
        crops.setdefault(image.size, []).append(box)
        return crop(image, box)

    monkeypatch.setattr(Image.Image, "crop", remember)
    task = ImageFolder(str(root), 8)
    for seed in range(60):
        whole(task, "train", seed)
    areas, ratios = [], []
    for left, top, right, bottom in crops[400, 300]:
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        areas.append((right - left) * (bottom - top) / (400 * 300))
        ratios.append((right - left) / (bottom - top))
    assert 0.078 < min(areas) < 0.2 < 0.8 < max(areas) <= 1
    assert 0.74 < min(ratios) < 0.85 < 1.2 < max(ratios) < 1.35
    lefts, tops, *_ = (set(edges) for edges in zip(*crops[400, 300], strict=True))
    assert len(lefts) > 20 < len(tops)
    assert (198, 0, 203, 4) in crops[400, 4]  # hardly anything else fits


def test_each_image_has_its_crop_and_half_are_mirrored(root: Path) -> None:
    ramp = numpy.tile(numpy.arange(0, 250, 5, dtype=numpy.uint8)[None, :, None], (36, 1, 3))
    for file in (root / "train").glob("*/*.png"):
        Image.fromarray(ramp).save(file)
    task = ImageFolder(str(root), 8)
    images = torch.cat([whole(task, "train", seed)[0] for seed in range(20)])
    assert len(images[:8].unique(dim=0)) == 8  # of the same pixels, in the same epoch
    mirrored = (images[..., 0] > images[..., -1]).all(2).all(1).double().mean().item()
    assert 0.35 < mirrored < 0.65


def test_the_seed_decides_what_images_become(root: Path) -> None:
    task = ImageFolder(str(root), 16)
    before = torch.get_rng_state()
    random_state = random.getstate()
    images, labels = whole(task, "train", seed=5)
    again = whole(ImageFolder(str(root), 16), "train", seed=5)
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    assert torch.equal(whole(task, "test")[0], whole(task, "test")[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == random_state
    (one,), _ = next(task.batches("train", 1, seed=5))
    assert torch.equal(one[0], images[0])
    other = whole(task, "train", seed=6)[0]
    assert not any(torch.equal(first, second) for first in images for second in other)


def test_workers_change_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = []

    def remember(*arguments: Any, **options: Any) -> DataLoader[Any]:
        workers.append(options["num_workers"])
        return DataLoader(*arguments, **options)

    monkeypatch.setattr("dkm_models.imagefolder.DataLoader", remember)
    splits: tuple[tuple[Split, int | None], ...] = (("train", 5), ("test", None))
    for split, seed in splits:
        alone = whole(ImageFolder(str(root), 16), split, seed)
        helped = whole(ImageFolder(str(root), 16, workers=2), split, seed)
        assert torch.equal(alone[0], helped[0])
        assert torch.equal(alone[1], helped[1])
    assert workers == [0, 2, 0, 2]


def test_shuffled_images_keep_their_labels(root: Path) -> None:
    for file in (root / "train").glob("*/*.png"):
        Image.new("RGB", (50, 36), "white" if file.parent.name == "dog" else "black").save(file)
    for workers in (0, 2):
        images, labels = whole(ImageFolder(str(root), 8, workers), "train", seed=1)
        assert torch.equal((images > 0).flatten(1).all(1), labels == 1)


def test_crops_of_training_are_averaged(root: Path) -> None:
    stripes = numpy.zeros((36, 50, 3), numpy.uint8)
    stripes[:, ::2] = 255
    for file in (root / "train").glob("*/*.png"):
        Image.fromarray(stripes).save(file)
    images = whole(ImageFolder(str(root), 4), "train", seed=0)[0]
    shades = images * torch.tensor(DEVIATION).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert 0.1 < shades.min() < shades.max() < 0.9  # a chosen pixel would be 0 or 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_all_images_become_red_green_and_blue(root: Path, mode: str) -> None:
    for file in (root / "val").glob("*/*.png"):
        image = Image.open(file).convert(mode)
        image.save(file, format="TIFF")  # by content, not by name
    assert whole(ImageFolder(str(root), 16), "test")[0].shape == (6, 3, 16, 16)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("images", "images: no such folder: name the one that holds train and val"),
        (
            "images/val",
            "images/val: no such folder: make it, with a folder of images for each class",
        ),
        ("images/train/*", "images/train: no folders there: put the images of each class into one"),
        ("images/val/dog/*", "images/val/dog: no images there: add some, or remove the class"),
        ("images/val/cat", "images/val: no folder 'cat', but train has one: both need the same"),
        ("images/train/cat", "images/train: no folder 'cat', but val has one: both need the same"),
    ],
)
def test_folders_that_are_not_right_are_named(root: Path, gone: str, message: str) -> None:
    for path in root.parent.glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    task = ImageFolder(str(root), 16)
    with pytest.raises(InvalidInput, match=re.escape(f"{root.parent}/{message}")):
        size_of(task, "test")
    with pytest.raises(InvalidInput, match=re.escape(message)):
        whole(task, "train")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"text", "cannot identify image file"), (None, "truncated"), (b"", "cannot identify")],
)
def test_an_image_that_cannot_be_read_is_named(
    root: Path, content: bytes | None, message: str, workers: int
) -> None:
    file = root / "val" / "dog" / "1.png"
    file.write_bytes(file.read_bytes()[:900] if content is None else content)
    task = ImageFolder(str(root), 16, workers=workers)
    with pytest.raises(InvalidInput) as raised:
        whole(task, "test")
    assert str(raised.value).startswith(f"{file}: not an image that Pillow can read: ")
    assert message in str(raised.value)
    assert str(raised.value).endswith(": replace or remove it")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size is 0, allowed: whole numbers from 1"),
        ({"size": 224.0}, "size is 224.0"),
        ({"workers": -1}, "workers is -1, allowed: whole numbers from 0"),
        ({"workers": True}, "workers is True"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5, allowed: 0 to below 1"),
        ({"label_smoothing": "0.1"}, "label_smoothing is '0.1'"),
    ],
)
def test_arguments_that_are_not_right_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        ImageFolder("images", **arguments)


def test_without_pillow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(Unsupported, match=r"PIL not installed: pip install 'dkm-export\[models\]'"):
        whole(ImageFolder(str(root), 16), "test")
