"""Figures of numbers as SVG: text in the page's font, colours by the page's classes, no script.

A figure is drawn for a width in pixels. Marks that mean different things differ in shape too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dkm_export.reporting import drawing
from dkm_export.reporting.axes import Axis, counts, labels, signed, sizes
from dkm_export.reporting.markup import Markup, tag, together

WIDE, NARROW = 720, 344
"""Widths of the figures that have one for large and one for small screens."""

_SMALL = 360


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


def both(draw: Callable[[int], Markup]) -> Markup:
    """A figure for large screens and for small ones; the page shows one of them."""
    wide, narrow = tag("div", draw(WIDE), class_="wide"), tag("div", draw(NARROW), class_="narrow")
    return together(wide, narrow)


def epochs(
    width: int, series: Sequence[Series], reference: float | None, metric: str, description: str
) -> Markup:
    """Values by epoch, 1 and on, with a level across."""
    frame = drawing.Frame.of(width, 300 if width == WIDE else 250)
    count = len(series[0].values)
    levels = [] if reference is None else [reference]
    found = [value for line in series for value in line.values] + levels
    y = Axis.around(found, frame.bottom, frame.top, margin=0.1)
    # half an epoch of room on both sides
    x = Axis(0.5, count + 0.5, frame.left, frame.right)
    marks = [drawing.line(frame.left, y.at(v), frame.right, y.at(v), "reference") for v in levels]
    for line in series:
        spots = [(x.at(i), y.at(value)) for i, value in enumerate(line.values, 1)]
        marks.append(drawing.path(spots, line.style))
        if count <= width / 12:
            for i, (place, value) in enumerate(zip(spots, line.values, strict=True), 1):
                hint = f"epoch {i}, {line.name}: {value:.2f}"
                marks.append(drawing.mark(line.style, *place, hint))
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
    frame = drawing.Frame.of(width, 340 if width == WIDE else 280, left=58)
    spots = [*best, *named, chosen]
    x = Axis.around([p.x for p in spots], frame.left, frame.right, margin=0.08, may_be_log=True)
    y = Axis.around([p.y for p in spots], frame.bottom, frame.top, margin=0.08, may_be_log=True)

    def place(spot: Spot) -> tuple[float, float]:
        return x.at(spot.x), y.at(spot.y)

    def dot(spot: Spot, style: str) -> Markup:
        name = f"{spot.name}: " if spot.name else ""
        return drawing.mark(style, *place(spot), f"{name}{spot.x:,.0f} B, error {spot.y:.3g}")

    marks = [drawing.path([place(spot) for spot in best], "front")]
    marks += [dot(spot, "front") for spot in best]
    marks += [dot(spot, "uniform") for spot in named]
    marks.append(dot(chosen, "chosen"))
    labelled = [(*place(spot), spot.name) for spot in (chosen, *named)]
    along = drawing.between([place(spot) for spot in best])
    marks += drawing.names(labelled, [*along, *(place(spot) for spot in (chosen, *named))], frame)
    return frame.draw(
        description,
        frame.vertical(y, labels, "predicted error"),
        frame.horizontal(x, sizes, "bytes", 8 if width == WIDE else 5),
        *marks,
    )


def stems(values: Sequence[tuple[float, int]], description: str) -> Markup:
    """How many weights have each value: a stem for each, and a tick below where there are none."""
    frame = drawing.Frame.of(_SMALL, 220)
    x = Axis.around([value for value, _ in values], frame.left, frame.right, margin=0.03)
    y = Axis(0, 1.05 * max(1, *(count for _, count in values)), frame.bottom, frame.top)
    marks = [drawing.zero(x, frame)]
    for value, count in values:
        place, top = x.at(value), y.at(count)
        if not count:
            marks.append(drawing.line(place, frame.bottom, place, frame.bottom + 7, "unused"))
            continue
        hint = tag("title", f"{signed(value, '.4g')}: {count:,} weights")
        marks.append(drawing.line(place, frame.bottom, place, top, "stem", hint))
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
    frame = drawing.Frame.of(_SMALL, 220)
    # centroids that no weight has may lie beyond all weights
    x = Axis.around((*edges, *centroids), frame.left, frame.right, margin=0.03)
    y = Axis(0, 1.05 * max(1, *weights), frame.bottom, frame.top)
    marks = [drawing.zero(x, frame)]
    for (low, high), count in zip(pairwise(edges), weights, strict=True):
        left, right, top = x.at(low), x.at(high), y.at(count)
        hint = tag("title", f"{signed(low, '.3g')} to {signed(high, '.3g')}: {count:,} weights")
        size = {"width": max(0.5, right - left - 0.8), "height": frame.bottom - top}
        marks.append(tag("rect", hint, x=left, y=top, class_="bin", **size))
    for place in sorted({round(x.at(value), 1) for value in centroids}):
        marks.append(drawing.line(place, frame.bottom, place, frame.bottom + 7, "rug"))
    return frame.draw(
        description,
        frame.vertical(y, counts, "weights", 4),
        *marks,
        frame.horizontal(x, labels, "weight", 5),
    )


def cloud(spots: Sequence[tuple[float, float, int]], description: str) -> Markup:
    """Discs in a plane, with an area of their count; a cross where the count is 0."""
    frame = drawing.Frame.of(_SMALL, 220)
    x = Axis.around([spot[0] for spot in spots], frame.left, frame.right, margin=0.12)
    y = Axis.around([spot[1] for spot in spots], frame.bottom, frame.top, margin=0.12)
    most = max(1, *(count for _, _, count in spots))
    # many discs are small ones
    largest = 9 * min(1.0, (64 / len(spots)) ** 0.5)
    marks = [drawing.zero(x, frame)]
    for first, second, count in spots:
        place = x.at(first), y.at(second)
        hint = tag("title", f"({signed(first, '.3g')}, {signed(second, '.3g')}): {count:,} vectors")
        if count:
            radius = 1.5 + largest * (count / most) ** 0.5
            marks.append(tag("circle", hint, cx=place[0], cy=place[1], r=radius, class_="disc"))
        else:
            marks.append(drawing.cross(*place, "unused"))
    return frame.draw(
        description,
        frame.vertical(y, labels, "second weight", 4),
        *marks,
        frame.horizontal(x, labels, "first weight", 5),
    )


def _whole(values: Sequence[float]) -> list[str]:
    """Whole numbers only."""
    return [f"{value:.0f}" if value == round(value) else "" for value in values]
