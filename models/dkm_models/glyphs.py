"""Characters in fonts that training never sees: a task hard enough to tell methods apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkm_export.errors import InvalidInput, Unsupported
from dkm_export.plugins import missing_packages
from dkm_export.task import Batch, Split
from dkm_models.classification import Classification

CHARACTERS = digits + ascii_uppercase + ascii_lowercase
SIZE = 28
"""Height and width of an image."""

FONTS: dict[Split, tuple[str, ...]] = {
    "train": (
        *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
        *("DejaVuSansMono", "DejaVuSansMono-Bold"),
        *("DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
        *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
        *("cmr10", "cmb10", "cmti10", "cmss10", "cmtt10"),
    ),
    "test": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
}
"""Of matplotlib, all that draw these characters as plain letters: DejaVu and Computer Modern for
training, the whole STIX family, which resembles Times, for the test."""

_PER_CHARACTER: dict[Split, int] = {"train": 150, "test": 100}
_TEST_SEED = 0

_CANVAS = 2 * SIZE
"""Glyphs are drawn once, twice as large as in an image, and distorted from there."""

_BASELINE = 38
_CAPITAL = 30
"""Height of an H: the same in all fonts, because only size tells o from O."""

# How far an image may be from the drawn glyph, at most.
_ANGLE = math.radians(15)
_SHEAR, _ZOOM, _STRETCH, _SHIFT = 0.2, 0.1, 0.15, 0.1
_FAINTEST, _NOISE = 0.3, 0.25

_BLOCK = 1024
"""Images that are distorted at once."""


class GlyphsCNN(nn.Module):
    """``[batch, 1, 28, 28]`` images to ``[batch, 62]`` logits; 234,726 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_unit(1, 24),
            nn.MaxPool2d(2),
            *_unit(24, 48),
            nn.MaxPool2d(2),
            *_unit(48, 96),
            nn.MaxPool2d(2),
            *_unit(96, 128),
        )
        self.classifier = nn.Linear(128 * 3 * 3, len(CHARACTERS))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(image).flatten(1))
        return logits


def glyphs_cnn() -> GlyphsCNN:
    """The network of the task, untrained."""
    return GlyphsCNN()


class Glyphs(Classification):
    """Digits and letters, 62 classes: turned, sheared, stretched, faint, noisy, light or dark.

    Every seed distorts anew, so that no two epochs of training see the same images; the test
    images never change. Both depend on nothing but the seed and the versions of matplotlib, which
    has the fonts, and Pillow, which draws them.
    """

    def size(self, split: Split) -> int:
        return _PER_CHARACTER[split] * len(CHARACTERS)

    def batches(self, split: Split, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        drawn = self._drawn[split]
        generator = torch.Generator().manual_seed(_TEST_SEED if seed is None else seed)
        order = torch.arange(self.size(split))
        if seed is not None:
            order = torch.randperm(len(order), generator=generator)
        labels = order % len(CHARACTERS)
        fonts = order // len(CHARACTERS) % len(drawn)
        # all at once, so that no image depends on the size of the batches
        images = torch.cat(
            [
                _distorted(drawn[font, label], generator)
                for font, label in zip(fonts.split(_BLOCK), labels.split(_BLOCK), strict=True)
            ]
        )
        for image, label in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            yield (image,), label

    @cached_property
    def _drawn(self) -> dict[Split, Tensor]:
        """By split: ``[fonts, 62, canvas, canvas]``, ink from 0 to 1."""
        missing = missing_packages(("matplotlib", "PIL"), "models")
        if missing:
            raise Unsupported(f"the glyphs task: {missing}")
        import matplotlib

        folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        return {
            split: torch.stack([_draw(folder / f"{name}.ttf") for name in names])
            for split, names in FONTS.items()
        }


def _draw(font: Path) -> Tensor:
    """All characters of a font on one baseline, float32 ``[62, canvas, canvas]`` from 0 to 1."""
    from PIL import Image, ImageDraw, ImageFont

    try:
        face = ImageFont.truetype(font, 10 * _CAPITAL, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise InvalidInput(
            f"{font}: {error}: the glyphs task needs a matplotlib that carries this font"
        ) from error
    top = face.getbbox("H", anchor="ls")[1]
    face = face.font_variant(size=10 * _CAPITAL * _CAPITAL / -top)
    images = []
    for character in CHARACTERS:
        image = Image.new("L", (_CANVAS, _CANVAS))
        ImageDraw.Draw(image).text((_CANVAS / 2, _BASELINE), character, 255, face, anchor="ms")
        images.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8))
    return torch.stack(images).reshape(-1, _CANVAS, _CANVAS) / 255


def _distorted(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``[n, 1, 28, 28]`` of drawn glyphs ``[n, canvas, canvas]``: noise around -0.5..0.5."""
    count = len(ink)

    def spread(most: float) -> Tensor:
        return most * (2 * torch.rand(count, generator=generator) - 1)

    angle, shear, height = spread(_ANGLE), spread(_SHEAR), 1 + spread(_ZOOM)
    width = height * (1 + spread(_STRETCH))
    cosine, sine = angle.cos(), angle.sin()
    rows = (
        torch.stack([width * cosine, width * (shear * cosine - sine), spread(_SHIFT)], 1),
        torch.stack([height * sine, height * (shear * sine + cosine), spread(_SHIFT)], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), [count, 1, SIZE, SIZE], align_corners=False)
    image = F.grid_sample(ink[:, None], grid, align_corners=False)
    sign = 1 - 2 * torch.randint(2, (count,), generator=generator)
    contrast = sign * (_FAINTEST + (1 - _FAINTEST) * torch.rand(count, generator=generator))
    strength = _NOISE * torch.rand(count, generator=generator)
    noise = torch.randn(image.shape, generator=generator)
    each = (slice(None), None, None, None)
    return contrast[each] * (image - 0.5) + strength[each] * noise


def _unit(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()
