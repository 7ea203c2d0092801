"""Figures of numbers as SVG: text in the page's font, colours by the page's classes, no script.

A figure is drawn for a width in pixels. Marks that mean different things differ in shape too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dkm_export.reporting.axes import Axis, Label, counts, labels, signed, sizes
from dkm_export.reporting.markup import Markup, tag, together

WIDE, NARROW = 720, 344
"""Widths of the figures that have one for large and one for small screens."""

_SMALL = 360
_LINE = 16


@dataclass(frozen=True)
class Series:
    """One line of a figure; ``style`` is soft, hard or front."""

    name: str
    style: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Spot:
    """One point of a figure, with what it is called there."""

    x: float
    y: float
    name: str = ""


@dataclass(frozen=True)
class _Frame:
    """The area between the axes, ``left`` to ``right`` and ``top`` to ``bottom``."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int

    @classmethod
    def of(cls, width: int, height: int, *, left: int = 52) -> _Frame:
        return cls(width, height, left, width - 14, 26, height - 40)

    def draw(self, description: str, *content: Markup) -> Markup:
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
            marks.append(_line(x, self.bottom, x, self.bottom + 4, "axis"))
            if x - half > end + 6:
                marks.append(_write(x, self.bottom + _LINE + 2, text, "tick", "middle"))
                end = x + half
        base = _line(self.left, self.bottom, self.right, self.bottom, "axis")
        name = _write(self.right, self.height - 4, title, "title", "end")
        return together(base, marks, name)

    def vertical(self, axis: Axis, label: Label, title: str, most: int = 5) -> Markup:
        """Lines across with ticks to the left, and what they are above."""
        ticks = axis.ticks(most)
        marks = []
        for value, text in zip(ticks, label(ticks), strict=True):
            y = axis.at(value)
            marks.append(_line(self.left, y, self.right, y, "grid"))
            marks.append(_write(self.left - 8, y + 4, text, "tick", "end"))
        most_letters = self.width // 7
        if len(title) > most_letters:
            title = f"{title[: most_letters - 1]}\N{HORIZONTAL ELLIPSIS}"
        return together(_write(0, 12, title, "title", "start"), marks)


def both(draw: Callable[[int], Markup]) -> Markup:
    """A figure for large screens and for small ones; the page shows one of them."""
    wide, narrow = tag("div", draw(WIDE), class_="wide"), tag("div", draw(NARROW), class_="narrow")
    return together(wide, narrow)


def epochs(
    width: int, series: Sequence[Series], reference: float | None, metric: str, description: str
) -> Markup:
    """Values by epoch, 1 and on, with a level across."""
    frame = _Frame.of(width, 300 if width == WIDE else 250)
    count = len(series[0].values)
    levels = [] if reference is None else [reference]
    found = [value for line in series for value in line.values] + levels
    y = Axis.around(found, frame.bottom, frame.top, margin=0.1)
    # half an epoch of room on both sides
    x = Axis(0.5, count + 0.5, frame.left, frame.right)
    marks = [_line(frame.left, y.at(v), frame.right, y.at(v), "reference") for v in levels]
    for line in series:
        spots = [(x.at(i), y.at(value)) for i, value in enumerate(line.values, 1)]
        marks.append(_path(spots, line.style))
        if count <= width / 12:
            for i, (place, value) in enumerate(zip(spots, line.values, strict=True), 1):
                hint = f"epoch {i}, {line.name}: {value:.2f}"
                marks.append(_mark(line.style, *place, hint))
    return frame.draw(
        description,
        frame.vertical(y, labels, metric),
        frame.horizontal(x, _whole, "epoch", 12 if width == WIDE else 7),
        *marks,
    )


def front(
    width: int, best: Sequence[Spot], named: Sequence[Spot], chosen: Spot, description: str
) -> Markup:
    """Bytes against errors: a line of the best, others by name, and the one that was chosen."""
    frame = _Frame.of(width, 340 if width == WIDE else 280, left=58)
    spots = [*best, *named, chosen]
    x = Axis.around([p.x for p in spots], frame.left, frame.right, margin=0.08, may_be_log=True)
    y = Axis.around([p.y for p in spots], frame.bottom, frame.top, margin=0.08, may_be_log=True)

    def place(spot: Spot) -> tuple[float, float]:
        return x.at(spot.x), y.at(spot.y)

    def mark(spot: Spot, style: str) -> Markup:
        name = f"{spot.name}: " if spot.name else ""
        return _mark(style, *place(spot), f"{name}{spot.x:,.0f} B, error {spot.y:.3g}")

    marks = [_path([place(spot) for spot in best], "front")]
    marks += [mark(spot, "front") for spot in best]
    marks += [mark(spot, "uniform") for spot in named]
    marks.append(mark(chosen, "chosen"))
    labelled = [(*place(spot), spot.name) for spot in (chosen, *named)]
    line = _between([place(spot) for spot in best])
    marks += _names(labelled, [*line, *(place(spot) for spot in (chosen, *named))], frame)
    return frame.draw(
        description,
        frame.vertical(y, labels, "predicted error"),
        frame.horizontal(x, sizes, "bytes", 8 if width == WIDE else 5),
        *marks,
    )


def stems(values: Sequence[tuple[float, int]], description: str) -> Markup:
    """How many weights have each value: a stem for each, and a tick below where there are none."""
    frame = _Frame.of(_SMALL, 220)
    x = Axis.around([value for value, _ in values], frame.left, frame.right, margin=0.03)
    y = Axis(0, 1.05 * max(1, *(count for _, count in values)), frame.bottom, frame.top)
    marks = [_zero(x, frame)]
    for value, count in values:
        place, top = x.at(value), y.at(count)
        if not count:
            marks.append(_line(place, frame.bottom, place, frame.bottom + 7, "unused"))
            continue
        hint = tag("title", f"{signed(value, '.4g')}: {count:,} weights")
        marks.append(_line(place, frame.bottom, place, top, "stem", hint))
        marks.append(tag("circle", cx=place, cy=top, r=2.6, class_="bead"))
    return frame.draw(
        description,
        frame.vertical(y, counts, "weights", 4),
        *marks,
        frame.horizontal(x, labels, "centroid", 5),
    )


def bins(
    edges: Sequence[float], weights: Sequence[int], centroids: Sequence[float], description: str
) -> Markup:
    """A histogram, and a tick below for every centroid."""
    frame = _Frame.of(_SMALL, 220)
    x = Axis.around(edges, frame.left, frame.right, margin=0.03)
    y = Axis(0, 1.05 * max(1, *weights), frame.bottom, frame.top)
    marks = [_zero(x, frame)]
    for (low, high), count in zip(pairwise(edges), weights, strict=True):
        left, right, top = x.at(low), x.at(high), y.at(count)
        hint = tag("title", f"{signed(low, '.3g')} to {signed(high, '.3g')}: {count:,} weights")
        size = {"width": max(0.5, right - left - 0.8), "height": frame.bottom - top}
        marks.append(tag("rect", hint, x=left, y=top, class_="bin", **size))
    for place in sorted({round(x.at(value), 1) for value in centroids}):
        marks.append(_line(place, frame.bottom, place, frame.bottom + 7, "rug"))
    return frame.draw(
        description,
        frame.vertical(y, counts, "weights", 4),
        *marks,
        frame.horizontal(x, labels, "weight", 5),
    )


def cloud(spots: Sequence[tuple[float, float, int]], description: str) -> Markup:
    """Discs in a plane, with an area of their count; a cross where the count is 0."""
    frame = _Frame.of(_SMALL, 220)
    x = Axis.around([spot[0] for spot in spots], frame.left, frame.right, margin=0.12)
    y = Axis.around([spot[1] for spot in spots], frame.bottom, frame.top, margin=0.12)
    most = max(1, *(count for _, _, count in spots))
    # many discs are small ones
    largest = 9 * min(1.0, (64 / len(spots)) ** 0.5)
    marks = [_zero(x, frame)]
    for first, second, count in spots:
        place = x.at(first), y.at(second)
        hint = tag("title", f"({signed(first, '.3g')}, {signed(second, '.3g')}): {count:,} vectors")
        if count:
            radius = 1.5 + largest * (count / most) ** 0.5
            marks.append(tag("circle", hint, cx=place[0], cy=place[1], r=radius, class_="disc"))
        else:
            marks.append(_cross(*place, "unused"))
    return frame.draw(
        description,
        frame.vertical(y, labels, "second weight", 4),
        *marks,
        frame.horizontal(x, labels, "first weight", 5),
    )


def glyph(style: str) -> Markup:
    """A line with its mark, for a legend."""
    line = [(1.0, 8.0), (27.0, 8.0)]
    parts = {
        "reference": [_line(*line[0], *line[1], "reference")],
        "soft": [_path(line, "soft"), _mark("soft", 14, 8, "")],
        "hard": [_path(line, "hard"), _mark("hard", 14, 8, "")],
        "front": [_path(line, "front"), _mark("front", 14, 8, "")],
    }.get(style, [_mark(style, 14, 8, "")])
    return tag("svg", *parts, viewBox="0 0 28 16", class_="glyph", aria_hidden="true")


def _between(spots: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """The points of a line, and others along it, few pixels apart."""
    yield from spots
    for (x1, y1), (x2, y2) in pairwise(spots):
        steps = int(max(abs(x2 - x1), abs(y2 - y1)) / 6)
        for i in range(1, steps):
            yield x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps


def _names(
    labelled: Sequence[tuple[float, float, str]],
    spots: Sequence[tuple[float, float]],
    frame: _Frame,
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
                marks.append(_write(place, base, name, "name", anchor))
                break
    return marks


_Box = tuple[float, float, float, float]


def _overlap(one: _Box, other: _Box) -> bool:
    across = one[0] < other[2] and other[0] < one[2]
    return across and one[1] < other[3] and other[1] < one[3]


def _whole(values: Sequence[float]) -> list[str]:
    """Whole numbers only."""
    return [f"{value:.0f}" if value == round(value) else "" for value in values]


def _mark(style: str, x: float, y: float, hint: str) -> Markup:
    title = tag("title", hint) if hint else None
    if style == "hard":
        return tag("rect", title, x=x - 3.5, y=y - 3.5, width=7, height=7, class_="mark hard")
    if style in ("uniform", "chosen"):
        reach = 5.5 if style == "uniform" else 7.5
        corners = f"M{x:.1f} {y - reach:.1f}l{reach} {reach}l-{reach} {reach}l-{reach} -{reach}z"
        return tag("path", title, d=corners, class_=f"mark {style}")
    radius = 5 if style == "soft" else 2.5
    return tag("circle", title, cx=x, cy=y, r=radius, class_=f"mark {style}")


def _cross(x: float, y: float, style: str) -> Markup:
    return tag("path", d=f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6", class_=style)


def _path(spots: Sequence[tuple[float, float]], style: str) -> Markup:
    if not spots:
        return Markup("")
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
    return tag("path", d=f"M{steps}", class_=f"line {style}")


def _line(x1: float, y1: float, x2: float, y2: float, style: str, *more: Markup) -> Markup:
    return tag("line", *more, x1=x1, y1=y1, x2=x2, y2=y2, class_=style)


def _zero(axis: Axis, frame: _Frame) -> Markup:
    if not axis.low < 0 < axis.high:
        return Markup("")
    return _line(axis.at(0), frame.top, axis.at(0), frame.bottom, "zero")


def _write(x: float, y: float, text: str, style: str, anchor: str) -> Markup:
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=style)
