"""The best plan whose files keep to a limit: plans and measurements take turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil

from dkm_export.errors import InvalidInput
from dkm_export.planning.allocation import Allocation
from dkm_export.planning.costs import Costs

_CLOSE = 0.002
"""Share of the limit that may stay unused before another plan is measured."""

MOST_MEASUREMENTS = 9
"""The last one is for the smallest plan."""

Measure = Callable[[Allocation], Mapping[str, int]]
"""From a plan to the bytes of its files, by target."""


@dataclass(frozen=True)
class Fitted:
    """A plan and the bytes of its files, by target."""

    allocation: Allocation
    sizes: Mapping[str, int]


def fit(
    together: Costs, each: Mapping[str, Costs], limit: int, dense: int, measure: Measure
) -> Fitted:
    """The best plan that was found whose files have at most ``limit`` bytes.

    What a file takes beside palettes and their decoders only a measurement tells. Of several
    targets the one whose file is the largest at first is planned for, and choices that would be
    too large for another one are left out.

    Args:
        together: costs in the files of all targets.
        each: in those of single targets, by target.
        dense: about the bytes of a file that no plan changes, to start from.

    Raises:
        InvalidInput: when even the files of the smallest plan are larger.
    """
    best: Fitted | None = None
    measured: dict[tuple[int, ...], Mapping[str, int]] = {}
    search = _Search(together, limit - dense)
    while search.is_open:
        chosen = search.proposal()
        again = chosen.choices in measured
        if not again:
            if len(measured) == MOST_MEASUREMENTS - 1:
                break
            measured[chosen.choices] = measure(chosen)
        sizes = measured[chosen.choices]
        unused = {target: limit - size for target, size in sizes.items()}
        tightest = min(unused, key=unused.__getitem__)
        fits = unused[tightest] >= 0
        if fits and (best is None or chosen.error < best.allocation.error):
            best = Fitted(chosen, sizes)
        if fits and (unused[tightest] <= _CLOSE * limit or chosen.error <= together.least):
            break
        if len(each) > 1 and not search.others:
            others = dict(each)
            search = _Search(others.pop(tightest), search.room, others)
        if again and tightest in search.others:
            break
        search.learn(chosen, unused)
    if best is None:
        smallest = search.costs.smallest()
        best = Fitted(smallest, measured.get(smallest.choices) or measure(smallest))
        if max(best.sizes.values()) > limit:
            raise InvalidInput(
                f"nothing fits into {limit:,} bytes: with the smallest settings it is "
                f"{max(best.sizes.values()):,}: allow more, or smaller settings with --settings"
            )
    return best


@dataclass
class _Search:
    """For what the palettes of one target's file may take.

    Attributes:
        costs: in that file.
        room: bytes to try next.
        others: costs in the files of other targets.
    """

    costs: Costs
    room: int
    others: Mapping[str, Costs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._low, self._high = 0, self.costs.largest + 1
        self.room = max(0, min(self.room, self._high - 1))
        self._rooms: dict[str, int] = {}

    @property
    def is_open(self) -> bool:
        """Whether there is anything left to try."""
        return self._low <= self.room < self._high

    def proposal(self) -> Allocation:
        """The best plan in the room, or the smallest of all."""
        rooms = [(self.others[target], room) for target, room in self._rooms.items()]
        chosen = self.costs.allocate(
            self.room,
            lambda choices: all(costs.allocation(choices).cost <= room for costs, room in rooms),
        )
        return chosen or self.costs.smallest()

    def learn(self, chosen: Allocation, unused: Mapping[str, int]) -> None:
        """Narrow the room by what the files of a plan leave unused of the limit."""
        for target, costs in self.others.items():
            self._rooms[target] = costs.allocation(chosen.choices).cost + unused[target]
        if min(unused.values()) < 0 and min(unused, key=unused.__getitem__) in self.others:
            return  # the same room once more, for what fits the other target's file
        (own,) = (count for target, count in unused.items() if target not in self.others)
        if own >= 0:
            self._low = self.room + 1
        elif chosen.choices == self.costs.smallest().choices:
            self._high = 0  # nothing fits
        else:
            self._high = self.room
        self.room = min(self.costs.allocation(chosen.choices).cost + own, self._high - 1)
        if self.room < self._low:
            # what is tried next may share more, and so still fit
            self.room = min(ceil((1 + _CLOSE) * self._low), (self._low + self._high) // 2)
