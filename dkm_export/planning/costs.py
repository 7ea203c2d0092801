"""What settings cost in the files of targets: palettes, their decoders, and what decoders share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Self

from dkm_export.planning.allocation import Allocation, Options, allocate, front
from dkm_export.planning.candidates import Candidate, Targets

_MOST_SHARED = 5
"""Things that decoders share, of which all parts are tried."""


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

    def allocate(self, room: int) -> Allocation | None:
        """The least error within ``room`` bytes: for each part of what is shared, the best."""
        best: Allocation | None = None
        for kept in self._parts():
            allowed = [
                [index for index, need in enumerate(needs) if need <= kept] for needs in self.needs
            ]
            if not all(allowed):
                continue
            options = [
                Options([x.costs[i] for i in which], [x.errors[i] for i in which])
                for x, which in zip(self.options, allowed, strict=True)
            ]
            found = allocate(options, room - sum(self.shared[key] for key in kept))
            if found and (best is None or found.error < best.error):
                choices = tuple(
                    which[choice] for which, choice in zip(allowed, found.choices, strict=True)
                )
                best = Allocation(choices, self.total(choices), found.error)
        return best

    def smallest(self) -> Allocation:
        """The choice of fewest bytes, when what is shared is left out."""
        return front(self.options)[0]

    @property
    def largest(self) -> int:
        """Bytes that no choice exceeds."""
        return sum(max(x.costs) for x in self.options) + sum(self.shared.values())

    def total(self, choices: Sequence[int]) -> int:
        """Bytes of a choice for every layer."""
        used = frozenset[str]().union(
            *(needs[choice] for needs, choice in zip(self.needs, choices, strict=True))
        )
        own = sum(x.costs[choice] for x, choice in zip(self.options, choices, strict=True))
        return own + sum(self.shared[key] for key in used)

    def _parts(self) -> Iterator[frozenset[str]]:
        """All parts of what is shared, or only the whole of it when there are too many."""
        names = sorted(self.shared)
        fewest = 0 if len(names) <= _MOST_SHARED else len(names)
        for count in range(fewest, len(names) + 1):
            yield from map(frozenset, combinations(names, count))
