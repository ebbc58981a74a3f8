"""The order in which an epoch visits its samples: a seeded permutation of any size in constant memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import overload

__all__ = ["Order"]

_PAIRS = 3  # of rounds: six rounds are indistinguishable from a shuffle by pairs and places, if the halves are large
_SMALL = 1024  # below this size the halves are too small for that, and it takes
_SMALL_PAIRS = 12
_WORD = 0xFFFFFFFFFFFFFFFF
_MIX = 0x9E3779B97F4A7C15  # odd multipliers of SplitMix64
_STIR = 0xBF58476D1CE4E5B9
_CHUNK = 4096


@dataclass(frozen=True)
class Order:
    """A permutation of range(size) that depends on (size, seed, epoch) alone: the same on every machine, for ever.

    `order[i]` is the sample visited at place i, `order[a:b]` a list of them; IndexError outside 0 ... size, also for
    negative places and for a slice that goes past the end (a slice that shrinks would lose samples unseen).

    A Feistel network on pairs (left, right) of mixed radix, left x right just above size, whose round keys are hashed;
    an image outside the size is mapped again until it falls inside (cycle walking: Black and Rogaway 2002), which is
    rare: about one in sqrt(size).
    """

    size: int
    seed: int
    epoch: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"an order of {self.size} samples: there must be at least 1")

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> list[int]: ...

    def __getitem__(self, place: int | slice) -> int | list[int]:
        if isinstance(place, slice):
            start, stop = self._bounds(place)
            return self._images(start, stop)
        if not 0 <= place < self.size:
            raise IndexError(f"place {place} is outside an order of {self.size}")
        return self._images(place, place + 1)[0]

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.size, _CHUNK):
            yield from self._images(start, min(start + _CHUNK, self.size))

    def _bounds(self, places: slice) -> tuple[int, int]:
        start = 0 if places.start is None else places.start
        stop = self.size if places.stop is None else places.stop
        if places.step not in (None, 1):
            raise ValueError(f"an order has slices of step 1 only, not {places.step}")
        if start < 0 or stop < 0 or max(start, stop) > self.size:
            raise IndexError(f"places {start} to {stop} are outside an order of {self.size}")
        return start, stop

    @cached_property
    def _radix(self) -> tuple[int, int]:
        """(left, right), about square, with size <= left x right < size + left.

        `left` is even: rounds on two odd radices make even permutations only.
        """
        left = math.isqrt(self.size - 1) + 1
        left += left % 2
        return left, -(-self.size // left)

    @cached_property
    def _keys(self) -> tuple[tuple[int, int], ...]:
        """Two round keys of 64 bits for each pair of rounds."""
        pairs = _SMALL_PAIRS if self.size < _SMALL else _PAIRS
        names = [f"order/{self.size}/{self.seed}/{self.epoch}/{pair}".encode() for pair in range(pairs)]
        return tuple(_two_words(hashlib.blake2b(name, digest_size=16).digest()) for name in names)

    def _images(self, start: int, stop: int) -> list[int]:
        """One round adds a hash of one half to the other, which can be undone: hence a permutation."""
        (left_size, right_size), size, keys = self._radix, self.size, self._keys
        images = []
        for image in range(start, stop):
            while True:
                left, right = divmod(image, right_size)
                for odd, even in keys:
                    mixed = (right ^ odd) * _MIX & _WORD
                    left = (left + ((mixed ^ mixed >> 29) * _STIR >> 24)) % left_size
                    mixed = (left ^ even) * _MIX & _WORD
                    right = (right + ((mixed ^ mixed >> 29) * _STIR >> 24)) % right_size
                image = left * right_size + right
                if image < size:
                    break
            images.append(image)
        return images


def _two_words(digest: bytes) -> tuple[int, int]:
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
