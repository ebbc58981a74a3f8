"""The sample order of an epoch: a seeded permutation of any size in constant memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import overload

__all__ = ["SamplePermutation"]

_PAIRS = 3  # pairs of Feistel rounds; with large halves, six rounds pass tests of pairs and positions as a shuffle does
_SMALL = 1024  # below this size the halves are too small for that, and more rounds are needed
_SMALL_PAIRS = 12
_WORD = 0xFFFFFFFFFFFFFFFF
_FIRST_MULTIPLIER = 0x9E3779B97F4A7C15  # odd multipliers of SplitMix64
_SECOND_MULTIPLIER = 0xBF58476D1CE4E5B9
_CHUNK = 4096


@dataclass(frozen=True)
class SamplePermutation:
    """A permutation of range(size) that depends only on (size, seed, epoch) and is the same on every machine.

    `order[i]` is the sample at position i, `order[a:b]` a list of samples. IndexError is raised outside 0 ... size,
    also for negative positions and for a slice past the end (silently shortening it would lose samples).

    Implemented as a Feistel network on pairs (left, right) of mixed radix, with left x right just above size and
    hashed round keys. An image outside the range is mapped again until it falls inside (cycle walking, Black and
    Rogaway 2002), which is rare: about one in sqrt(size).
    """

    size: int
    seed: int
    epoch: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a permutation of {self.size} samples: at least 1 is needed")

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, position: int) -> int: ...

    @overload
    def __getitem__(self, position: slice) -> list[int]: ...

    def __getitem__(self, position: int | slice) -> int | list[int]:
        if isinstance(position, slice):
            start, stop = self._resolve_slice(position)
            return self._permute_range(start, stop)
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} is outside a permutation of {self.size} samples")
        return self._permute_range(position, position + 1)[0]

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.size, _CHUNK):
            yield from self._permute_range(start, min(start + _CHUNK, self.size))

    def _resolve_slice(self, positions: slice) -> tuple[int, int]:
        start = 0 if positions.start is None else positions.start
        stop = self.size if positions.stop is None else positions.stop
        if positions.step not in (None, 1):
            raise ValueError(f"only slices of step 1 are supported, not {positions.step}")
        if start < 0 or stop < 0 or max(start, stop) > self.size:
            raise IndexError(f"positions {start} to {stop} are outside a permutation of {self.size} samples")
        return start, stop

    @cached_property
    def _radix(self) -> tuple[int, int]:
        """(left, right), about equal, with size <= left x right < size + left.

        `left` is even, since rounds on two odd radices produce only even permutations.
        """
        left = math.isqrt(self.size - 1) + 1
        left += left % 2
        return left, -(-self.size // left)

    @cached_property
    def _round_keys(self) -> tuple[tuple[int, int], ...]:
        """Two 64-bit round keys for each pair of rounds."""
        pairs = _SMALL_PAIRS if self.size < _SMALL else _PAIRS
        names = [f"order/{self.size}/{self.seed}/{self.epoch}/{pair}".encode() for pair in range(pairs)]
        return tuple(_split_digest(hashlib.blake2b(name, digest_size=16).digest()) for name in names)

    def _permute_range(self, start: int, stop: int) -> list[int]:
        """The samples at positions `start` to `stop` - 1.

        Each round adds a hash of one half to the other, which is invertible, so the result is a permutation.
        """
        (left_size, right_size), size, keys = self._radix, self.size, self._round_keys
        images = []
        for image in range(start, stop):
            while True:
                left, right = divmod(image, right_size)
                for odd, even in keys:
                    mixed = (right ^ odd) * _FIRST_MULTIPLIER & _WORD
                    left = (left + ((mixed ^ mixed >> 29) * _SECOND_MULTIPLIER >> 24)) % left_size
                    mixed = (left ^ even) * _FIRST_MULTIPLIER & _WORD
                    right = (right + ((mixed ^ mixed >> 29) * _SECOND_MULTIPLIER >> 24)) % right_size
                image = left * right_size + right
                if image < size:
                    break
            images.append(image)
        return images


def _split_digest(digest: bytes) -> tuple[int, int]:
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
