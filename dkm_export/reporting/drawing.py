"""What figures are drawn of: the area between axes, lines, marks, and names beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dkm_export.reporting.axes import Axis, Label
from dkm_export.reporting.markup import Markup, tag, together

_LINE = 16


@dataclass(frozen=True)
class Frame:
    """The area between the axes, ``left`` to ``right`` and ``top`` to ``bottom``."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int

    @classmethod
    def of(cls, width: int, height: int, *, left: int = 52) -> Frame:
        """The area in a figure of this size, beside ``left`` pixels of labels."""
        return cls(width, height, left, width - 14, 26, height - 40)

    def draw(self, description: str, *content: Markup) -> Markup:
        """The figure, which screen readers know by its description."""
        return tag(
            "svg",
            *content,
            viewBox=f"0 0 {self.width} {self.height}",
            role="img",
            aria_label=description,
            class_="chart",
        )

    def horizontal(self, axis: Axis, label: Label, title: str, most: int) -> Markup:
        """Ticks below, and what they are."""
        marks, end = [], -1e9
        ticks = axis.ticks(most)
        for value, text in zip(ticks, label(ticks), strict=True):
            if not text:
                continue
            x, half = axis.at(value), 3.6 * len(text)
            marks.append(line(x, self.bottom, x, self.bottom + 4, "axis"))
            if x - half > end + 6:
                marks.append(write(x, self.bottom + _LINE + 2, text, "tick", "middle"))
                end = x + half
        base = line(self.left, self.bottom, self.right, self.bottom, "axis")
        name = write(self.right, self.height - 4, title, "title", "end")
        return together(base, marks, name)

    def vertical(self, axis: Axis, label: Label, title: str, most: int = 5) -> Markup:
        """Lines across with ticks to the left, and what they are above."""
        ticks = axis.ticks(most)
        marks = []
        for value, text in zip(ticks, label(ticks), strict=True):
            y = axis.at(value)
            marks.append(line(self.left, y, self.right, y, "grid"))
            marks.append(write(self.left - 8, y + 4, text, "tick", "end"))
        most_letters = self.width // 7
        if len(title) > most_letters:
            title = f"{title[: most_letters - 1]}\N{HORIZONTAL ELLIPSIS}"
        return together(write(0, 12, title, "title", "start"), marks)


def glyph(style: str) -> Markup:
    """A line with its mark, for a legend."""
    parts = [] if style == "reference" else [mark(style, 14, 8, "")]
    if style == "reference":
        parts.append(line(1, 8, 27, 8, style))
    elif style in ("soft", "hard", "front"):
        parts.insert(0, path([(1, 8), (27, 8)], style))
    return tag("svg", *parts, viewBox="0 0 28 16", class_="glyph", aria_hidden="true")


def between(spots: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """The points of a line, and others along it, few pixels apart."""
    yield from spots
    for (x1, y1), (x2, y2) in pairwise(spots):
        steps = int(max(abs(x2 - x1), abs(y2 - y1)) / 6)
        for i in range(1, steps):
            yield x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps


def names(
    labelled: Sequence[tuple[float, float, str]],
    spots: Sequence[tuple[float, float]],
    frame: Frame,
) -> list[Markup]:
    """Names beside their points, where they cover neither points nor each other."""
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    marks = []
    for x, y, name in labelled:
        length = 7.0 * len(name)
        sides = (
            (x + 9, y + 4, "start"),
            (x - 9 - length, y + 4, "end"),
            (x - length / 2, y - 10, "middle"),
            (x - length / 2, y + 20, "middle"),
            (x + 6, y - 8, "start"),
            (x + 6, y + 17, "start"),
            (x - 6 - length, y - 8, "end"),
            (x - 6 - length, y + 17, "end"),
        )
        for left, base, anchor in sides:
            box = (left, base - 11, left + length, base + 3)
            inside = box[0] > frame.left and box[2] < frame.right and box[3] < frame.bottom
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                place = {"start": left, "end": left + length, "middle": x}[anchor]
                marks.append(write(place, base, name, "name", anchor))
                break
    return marks


_Box = tuple[float, float, float, float]


def _overlap(one: _Box, other: _Box) -> bool:
    across = one[0] < other[2] and other[0] < one[2]
    return across and one[1] < other[3] and other[1] < one[3]


def mark(style: str, x: float, y: float, hint: str) -> Markup:
    """A point in the shape of its style, which says ``hint`` when a pointer rests on it."""
    title = tag("title", hint) if hint else None
    if style == "hard":
        return tag("rect", title, x=x - 3.5, y=y - 3.5, width=7, height=7, class_="mark hard")
    if style in ("uniform", "chosen"):
        reach = 5.5 if style == "uniform" else 7.5
        corners = f"M{x:.1f} {y - reach:.1f}l{reach} {reach}l-{reach} {reach}l-{reach} -{reach}z"
        return tag("path", title, d=corners, class_=f"mark {style}")
    radius = 5 if style == "soft" else 2.5
    return tag("circle", title, cx=x, cy=y, r=radius, class_=f"mark {style}")


def cross(x: float, y: float, style: str) -> Markup:
    """Two strokes."""
    return tag("path", d=f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6", class_=style)


def path(spots: Sequence[tuple[float, float]], style: str) -> Markup:
    """A line through all spots."""
    if not spots:
        return Markup("")
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
    return tag("path", d=f"M{steps}", class_=f"line {style}")


def line(x1: float, y1: float, x2: float, y2: float, style: str, *more: Markup) -> Markup:
    """A straight line, and what it holds, such as a hint."""
    return tag("line", *more, x1=x1, y1=y1, x2=x2, y2=y2, class_=style)


def zero(axis: Axis, frame: Frame) -> Markup:
    """Where a horizontal axis is 0, if it is that anywhere."""
    if not axis.low < 0 < axis.high:
        return Markup("")
    return line(axis.at(0), frame.top, axis.at(0), frame.bottom, "zero")


def write(x: float, y: float, text: str, style: str, anchor: str) -> Markup:
    """Text that starts, has its middle or ends at ``x``."""
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=style)
