"""Photographs in a folder for each class, as ImageNet's usually are."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.plugins import missing_packages
from dkm_export.task import Batch, Split
from dkm_models.classification import Classification

if TYPE_CHECKING:
    from PIL.Image import Image

_FOLDERS: dict[Split, str] = {"train": "train", "test": "val"}

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue from 0 to 1."""

_LEAST_AREA = 0.08
"""Of an image, what a crop of training holds."""

_WIDEST = 4 / 3
"""Longer by shorter side of such a crop."""

_Box = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""

_TRIES = 10
"""Crops that are drawn for an image before one that surely fits is taken."""


class ImageFolder(Classification):
    """``root/train/<class>/*`` and ``root/val/<class>/*``; the latter is the test split.

    Training images are crops of random place, size and shape, half of them mirrored; test images
    are the middle of an image whose shorter side is 256 / 224 of ``size``. Inputs are float32
    ``[batch, 3, size, size]``, normalized by ImageNet's mean and deviation; classes are numbered in
    the order of their folders' names. What an image becomes depends on the seed and on its place
    among all images, not on ``workers``. Folders are read when they are first asked for.

    Args:
        root: the folder.
        size: height and width of the inputs.
        workers: processes that decode images; 0: none but this one.
        label_smoothing: see `Classification`.

    Raises:
        InvalidInput: when an argument, a folder or an image is not as it has to be.
        Unsupported: without the ``pillow`` package.

    Source: torchvision's training reference, whose crops these are: those of Szegedy et al., 2014,
    arXiv 1409.4842, section 6.
    """

    def __init__(
        self, root: str, size: int = 224, workers: int = 0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(label_smoothing)
        for name, value, least in (("size", size, 1), ("workers", workers, 0)):
            if type(value) is not int or value < least:
                raise InvalidInput(
                    f"task imagefolder: {name} is {value!r}, allowed: whole numbers from {least}"
                )
        self._root = Path(root)
        self._size = size
        self._workers = workers

    def size(self, split: Split) -> int:
        return len(self._files[split][1])

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        missing = missing_packages(("PIL",), "models")
        if missing:
            raise Unsupported(f"the imagefolder task: {missing}")
        files, labels = self._files[split]
        order = torch.arange(len(labels))
        if seed is not None:
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        chosen = [indices.tolist() for indices in order.split(batch_size)]
        loader: DataLoader[Tensor | InvalidInput] = DataLoader(
            _Images(files, self._size, seed),
            batch_size=None,
            sampler=chosen,
            num_workers=self._workers,
            generator=torch.Generator(),  # else it draws from the one that models draw from
        )
        for indices, images in zip(chosen, loader, strict=True):
            if isinstance(images, InvalidInput):
                raise images
            yield (_normalized(images),), labels[indices]

    @cached_property
    def _files(self) -> dict[Split, tuple[list[str], Tensor]]:
        """By split: the files, and their classes, int64 ``[files]``."""
        if not self._root.is_dir():
            raise InvalidInput(
                f"{self._root}: no such folder: name the one that holds train and val"
            )
        classes = {name: _classes(self._root / name) for name in _FOLDERS.values()}
        for name, other in (("train", "val"), ("val", "train")):
            missing = sorted(set(classes[other]) - set(classes[name]))
            if missing:
                raise InvalidInput(
                    f"{self._root / name}: no folder '{missing[0]}', but {other} has one: "
                    "both need the same classes"
                )
        return {split: _list(self._root / name, classes[name]) for split, name in _FOLDERS.items()}


class _Images(Dataset[Tensor | InvalidInput]):
    """Images by the list of their numbers, uint8 ``[images, 3, size, size]``.

    An error is returned, not raised, because torch would put a traceback of many lines into its
    message on the way out of a worker.
    """

    def __init__(self, files: list[str], size: int, seed: int | None) -> None:
        self._files = files
        self._size = size
        self._seed = seed

    def __getitem__(self, indices: list[int]) -> Tensor | InvalidInput:
        try:
            return torch.stack([self._image(index) for index in indices])
        except InvalidInput as error:
            return error

    def _image(self, index: int) -> Tensor:
        image = _decoded(self._files[index])
        if self._seed is None:
            image = _middle(image, self._size)
        else:
            image = _augmented(image, self._size, random.Random(f"{self._seed} {index}"))
        return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise InvalidInput(
            f"{folder}: no such folder: make it, with a folder of images for each class"
        )
    paths = [path for path in folder.iterdir() if path.name[0] != "."]
    classes = sorted(path.name for path in paths if path.is_dir())
    if not classes:
        raise InvalidInput(f"{folder}: no folders there: put the images of each class into one")
    return classes


def _list(folder: Path, classes: list[str]) -> tuple[list[str], Tensor]:
    """All files of a split but hidden ones, and their classes."""
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(str(path) for path in (folder / name).iterdir() if path.name[0] != ".")
        if not found:
            raise InvalidInput(f"{folder / name}: no images there: add some, or remove the class")
        files += found
        labels += [label] * len(found)
    return files, torch.tensor(labels)


def _decoded(file: str) -> Image:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise InvalidInput(
            f"{file}: not an image that Pillow can read: {error}: replace or remove it"
        ) from error


def _augmented(image: Image, size: int, draw: random.Random) -> Image:
    """A crop of random place, size and shape, mirrored or not."""
    from PIL import Image

    image = image.crop(_random_box(image.width, image.height, draw))
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else image


def _random_box(width: int, height: int, draw: random.Random) -> _Box:
    """Where a crop of random place, size and shape is."""
    most = math.log(_WIDEST)
    for _ in range(_TRIES):
        area = width * height * draw.uniform(_LEAST_AREA, 1)
        ratio = math.exp(draw.uniform(-most, most))
        inner = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < inner[0] <= width and 0 < inner[1] <= height:
            left, top = draw.randint(0, width - inner[0]), draw.randint(0, height - inner[1])
            return left, top, left + inner[0], top + inner[1]
    return _middle_box(
        width, height, min(width, round(height * _WIDEST)), min(height, round(width * _WIDEST))
    )


def _middle(image: Image, size: int) -> Image:
    """The middle of an image whose shorter side is 256 / 224 of ``size``."""
    from PIL import Image

    shorter = min(image.size)
    width, height = (size * 256 // 224 * side // shorter for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop(_middle_box(width, height, size, size))


def _middle_box(width: int, height: int, inner_width: int, inner_height: int) -> _Box:
    left, top = round((width - inner_width) / 2), round((height - inner_height) / 2)
    return left, top, left + inner_width, top + inner_height


def _normalized(images: Tensor) -> Tensor:
    """uint8 ``[batch, 3, size, size]`` as float32, by ImageNet's mean and deviation."""
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in (_MEAN, _DEVIATION))
    return images.div(255).sub_(mean).div_(deviation)  # in place: a batch can take gigabytes
