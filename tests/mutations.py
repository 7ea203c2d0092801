"""Damage to files, the same for the same seed."""

from __future__ import annotations

import random

_HUGE = (0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**48, 2**63 - 1, 2**64 - 1)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to three faults of those that readers stumble over."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        rng.choice(_FAULTS)(content, rng)
    return bytes(content)


def _flip_bits(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8) if content else 0):
        content[_place(content, rng)] ^= 1 << rng.randrange(8)


def _cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randint(0, len(content)) :]


def _remove(content: bytearray, rng: random.Random) -> None:
    start = rng.randint(0, len(content))
    del content[start : start + rng.randint(1, 64)]


def _insert(content: bytearray, rng: random.Random) -> None:
    start = rng.randint(0, len(content))
    content[start:start] = rng.randbytes(rng.randint(1, 64))


def _enlarge(content: bytearray, rng: random.Random) -> None:
    """A size, an offset or a count becomes huge, or nothing."""
    width = rng.choice((1, 2, 4, 8))
    start = rng.randint(0, len(content)) // width * width
    value = rng.choice((0, rng.randrange(len(content) + 1), *_HUGE)) % 256**width
    content[start : start + width] = value.to_bytes(width, "little")[: len(content) - start]


def _repeat(content: bytearray, rng: random.Random) -> None:
    """What an offset points to is somewhere else, too."""
    start, to = rng.randint(0, len(content)), rng.randint(0, len(content))
    part = content[start : start + rng.randint(1, 64)]
    content[to : to + len(part)] = part


def _place(content: bytearray, rng: random.Random) -> int:
    """Often near the front, where the headers are."""
    return rng.randrange(min(len(content), rng.choice((64, 512, 1 << 62))))


_FAULTS = (_flip_bits, _flip_bits, _cut, _remove, _insert, _enlarge, _enlarge, _repeat)
