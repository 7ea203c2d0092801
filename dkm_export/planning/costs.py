"""What settings cost in the files of targets: palettes, their decoders, and what decoders share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dkm_export.planning.allocation import Allocation, Knapsack, Options, front
from dkm_export.planning.candidates import Candidate, Targets

_LARGE = 500
"""Bytes of what is shared, from which on plans are made with it and without it."""

_MOST_LARGE = 4
"""Such things, the largest, each of which doubles the number of plans."""

_STEPS = 64
"""In which bytes are spent that were counted twice."""

_MOST_LESS = 8
"""The part of the room that a plan may leave unused, so that it fits otherwise."""

_MOST_EXCHANGES = 16
"""Of two layers that are tried, whether they fit all files."""

Fits = Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Costs:
    """What layers can choose from in the files of some targets, with what decoders share.

    Attributes:
        options: by layer; costs are of palettes and their own decoders.
        needs: by layer and setting, what of ``shared`` it needs.
        shared: bytes by name.
    """

    options: Sequence[Options]
    needs: Sequence[Sequence[frozenset[str]]]
    shared: Mapping[str, int]

    @classmethod
    def of(cls, layers: Sequence[Candidate], options: Sequence[Options], targets: Targets) -> Self:
        """Ask the targets what decoding takes, beside the ``options``."""
        found = [[layer.overhead(x, targets) for x in layer.settings] for layer in layers]
        shared = {key: n for each in found for one in each for key, n in one.shared.items()}
        return cls(
            [
                Options([cost + one.own for cost, one in zip(x.costs, each, strict=True)], x.errors)
                for x, each in zip(options, found, strict=True)
            ],
            [[frozenset(one.shared) for one in each] for each in found],
            shared,
        )

    def allocate(self, room: int, fits: Fits = lambda choices: True) -> Allocation | None:
        """The least error that was found within ``room`` bytes, or None when nothing fits.

        Args:
            room: bytes of palettes, decoders and what these share.
            fits: whether a choice for every layer may be taken.

        What decoders share counts once. For the largest such things both is tried, with and
        without them; the others first count for every layer. What that leaves over is spent, two
        layers at a time.
        """
        best: Allocation | None = None
        for part in self._parts():
            within = room - part.fixed
            knapsack = Knapsack(part.options, within + part.slack)
            less = max(within, 0) // _MOST_LESS
            for more in (
                *range(part.slack, -1, -(part.slack // _STEPS + 1)),
                *range(-1, -less, -(less // _STEPS + 1)),  # for what does not fit otherwise
            ):
                found = knapsack.at(within + more)
                if found is None or (best and found.error >= best.error):
                    break
                chosen = self.allocation(part.choices(found))
                if chosen.cost <= room and fits(chosen.choices):
                    best = chosen
                    break
        return best and self._improved(best, room, fits)

    def smallest(self) -> Allocation:
        """The choice of the fewest bytes, about: small shared things count for every layer."""
        least = (part.choices(front(part.options)[0]) for part in self._parts())
        return min(map(self.allocation, least), key=lambda chosen: chosen.cost)

    @property
    def largest(self) -> int:
        """Bytes that no choice exceeds."""
        return sum(max(x.costs) for x in self.options) + sum(self.shared.values())

    @property
    def least(self) -> float:
        """Error that no choice is below."""
        return sum(min(x.errors) for x in self.options)

    def _improved(self, chosen: Allocation, room: int, fits: Fits) -> Allocation:
        """Better choices for two layers at a time while there are any that fit."""
        choices, before = chosen.choices, None
        while choices != before:
            before = choices
            for one, other in combinations(range(len(choices)), 2):
                exchanges = self._exchanges(choices, one, other, room)
                choices = next(filter(fits, exchanges), choices)
        return self.allocation(choices)

    def _exchanges(
        self, choices: tuple[int, ...], one: int, other: int, room: int
    ) -> Iterator[tuple[int, ...]]:
        """Choices of less error within ``room`` that differ in these layers, the least first."""
        x, y = self.options[one], self.options[other]
        errors = np.add.outer(x.errors, y.errors)
        rest = [layer for layer in range(len(choices)) if layer not in (one, other)]
        fixed = sum(self.options[layer].costs[choices[layer]] for layer in rest)
        unused = ~np.any([self._needed[layer][choices[layer]] for layer in rest], axis=0)
        # all that is shared, but what neither the rest needs nor one of the two
        sizes = np.array(list(self.shared.values()), np.int64)
        spared = (~self._needed[one] * sizes * unused) @ (~self._needed[other]).T
        costs = fixed + np.add.outer(x.costs, y.costs) + sizes.sum() - spared
        better = np.argwhere((costs <= room) & (errors < errors[choices[one], choices[other]]))
        order = np.argsort(errors[tuple(better.T)], kind="stable")
        for i, j in better[order[:_MOST_EXCHANGES]].tolist():
            found = list(choices)
            found[one], found[other] = i, j
            yield tuple(found)

    @cached_property
    def _needed(self) -> list[NDArray[np.bool_]]:
        """By layer, ``[choices, shared]``: whether a choice needs what is shared."""
        return [
            np.array([[key in need for key in self.shared] for need in needs], bool)
            for needs in self.needs
        ]

    def allocation(self, choices: Sequence[int]) -> Allocation:
        """With its bytes, and its error."""
        pairs = list(zip(self.options, choices, strict=True))
        used = frozenset[str]().union(
            *(needs[choice] for needs, choice in zip(self.needs, choices, strict=True))
        )
        return Allocation(
            tuple(choices),
            sum(x.costs[i] for x, i in pairs) + sum(self.shared[key] for key in used),
            sum(x.errors[i] for x, i in pairs),
        )

    def _parts(self) -> Iterator[_Part]:
        """The choices that are left with some of the largest things that are shared."""
        large = sorted(key for key, count in self.shared.items() if count >= _LARGE)
        large = sorted(large, key=lambda key: -self.shared[key])[:_MOST_LARGE]
        for count in range(len(large) + 1):
            for kept in combinations(large, count):
                without = frozenset(large).difference(kept)
                allowed = [
                    [index for index, need in enumerate(needs) if not need & without]
                    for needs in self.needs
                ]
                if all(allowed):
                    yield self._part(allowed, frozenset(kept))

    def _part(self, allowed: Sequence[Sequence[int]], kept: frozenset[str]) -> _Part:
        options, slack = [], 0
        for x, needs, which in zip(self.options, self.needs, allowed, strict=True):
            small = [sum(self.shared[key] for key in needs[i] - kept) for i in which]
            costs = [x.costs[i] + more for i, more in zip(which, small, strict=True)]
            options.append(Options(costs, [x.errors[i] for i in which]))
            slack += max(small)
        return _Part(allowed, options, sum(self.shared[key] for key in kept), slack)


@dataclass(frozen=True)
class _Part:
    """Some of the choices.

    Attributes:
        allowed: by layer, their numbers among all of its choices.
        options: of these, by layer; costs are at least what they take.
        fixed: bytes that the choices share, and that no option has.
        slack: how much less all of them may take than ``fixed`` and their options.
    """

    allowed: Sequence[Sequence[int]]
    options: Sequence[Options]
    fixed: int
    slack: int

    def choices(self, found: Allocation) -> list[int]:
        """Numbers among all choices."""
        return [which[i] for which, i in zip(self.allowed, found.choices, strict=True)]
