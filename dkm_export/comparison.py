"""What differs between two files, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dkm_export.exporting.description import StoredTensor
from dkm_export.inspection import Inspection

if TYPE_CHECKING:
    from dkm_export.palette import Layout, Palette

SAME: Final = "bit-identical"
"""Said of a palette with the same LUT and indices on both sides."""

_BYTES: Final = {"value_bytes": "values", "lut_bytes": "LUT", "scale_bytes": "scales"}


@dataclass(frozen=True)
class Change:
    """What became of a tensor.

    Attributes:
        name: on both sides.
        before: what it was, or None where it was not there.
        after: what it is, or None where it is no longer there.
        palette: how its LUT and indices differ, `SAME`, or None where not both sides have a
            palette of the same layout that is known bit for bit.
        differences: what else does, in words.
        compared: whether all values of both sides are known, and so were compared.
    """

    name: str
    before: StoredTensor | None
    after: StoredTensor | None
    palette: str | None = None
    differences: tuple[str, ...] = ()
    compared: bool = False

    @property
    def changed(self) -> bool:
        """Whether there is any difference."""
        return (
            self.before is None
            or self.after is None
            or self.palette not in (None, SAME)
            or bool(self.differences)
        )

    @property
    def is_layer(self) -> bool:
        """Whether it is compressed on either side."""
        return any(side is not None and side.bits is not None for side in (self.before, self.after))


def compare(before: Inspection, after: Inspection) -> list[Change]:
    """Every tensor of both files, in their order; the same name is the same tensor.

    Values are compared where they are known on both sides: those of palettes, and dense tensors of
    checkpoints.
    """
    sides = [{tensor.name: tensor for tensor in x.description.tensors} for x in (before, after)]
    names = dict.fromkeys((*sides[0], *sides[1]))
    return [
        _change(
            name,
            (sides[0].get(name), sides[1].get(name)),
            (before.palettes.get(name), after.palettes.get(name)),
        )
        for name in names
    ]


def _change(
    name: str,
    sides: tuple[StoredTensor | None, StoredTensor | None],
    palettes: tuple[Palette | None, Palette | None],
) -> Change:
    before, after = sides
    if before is None or after is None:
        return Change(name, before, after)
    old, new = palettes
    palette, same = None, None
    differences = list(_differences(before, after))
    if old is not None and new is not None and _form(old) == _form(new):
        palette = old.difference(new) or SAME
        same = _same_scales((before, after), (old, new))
        differences += ["scales differ"] if same is False else []
    elif before.digest is not None and after.digest is not None:
        same = before.digest == after.digest
        differences += [] if same or differences else ["values differ"]
    return Change(name, before, after, palette, tuple(differences), compared=same is not None)


def _same_scales(
    sides: tuple[StoredTensor, StoredTensor], palettes: tuple[Palette, Palette]
) -> bool | None:
    """Whether the scales are the same; None where not both are known."""
    old, new = (palette.scale for palette in palettes)
    if old is not None and new is not None:
        return old.shape == new.shape and old.tobytes() == new.tobytes()
    nothing = old is None and new is None and not any(side.scale_bytes for side in sides)
    return True if nothing else None


def _form(palette: Palette) -> tuple[int, Layout]:
    return palette.bits, palette.layout


def _differences(before: StoredTensor, after: StoredTensor) -> Iterator[str]:
    for key in ("encoding", "shape", "bits", "dim", "groups"):
        old, new = getattr(before, key), getattr(after, key)
        if old != new:
            yield f"{key} {_text(new)} instead of {_text(old)}"
    if None not in (before.axis, after.axis) and before.axis != after.axis:
        yield f"axis {after.axis} instead of {before.axis}"
    for key, word in _BYTES.items():
        old, new = getattr(before, key), getattr(after, key)
        if old != new:
            yield f"{word} {new:,} B instead of {old:,} B"


def _text(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
