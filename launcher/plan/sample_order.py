"""The sample order of an epoch: a seeded permutation of any size in constant memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, overload

__all__ = ["SamplePermutation", "permute_spans"]

_PAIRS = 3  # pairs of Feistel rounds; with large halves, six rounds pass tests of pairs and positions as a shuffle does
_SMALL = 1024  # below this size the halves are too small for that, and more rounds are needed
_SMALL_PAIRS = 12
_WORD = 0xFFFFFFFFFFFFFFFF
_FIRST_MULTIPLIER = 0x9E3779B97F4A7C15  # odd multipliers of SplitMix64
_SECOND_MULTIPLIER = 0xBF58476D1CE4E5B9
_CHUNK = 4096
_FEW = 16  # up to this many positions are faster in plain Python than with numpy
_LOW_BITS = 2**24 - 1
_MAX_ARRAY_SIZE = 2**46  # up to this size no sum in `_add_hash` exceeds 64 bits


@dataclass(frozen=True)
class SamplePermutation:
    """A permutation of range(size) that depends only on (size, seed, epoch) and is the same on every machine.

    `order[i]` is the sample at position i, `order[a:b]` a list of samples. IndexError is raised outside 0 ... size,
    also for negative positions and for a slice past the end (silently shortening it would lose samples).

    Implemented as a Feistel network on pairs (left, right) of mixed radix, with left x right just above size and
    hashed round keys. An image outside the range is mapped again until it falls inside (cycle walking, Black and
    Rogaway 2002), which is rare: about one in sqrt(size).

    More than a few samples at a time are computed with numpy, which is imported only then.
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
        return self._permute(position)

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
        """The samples at positions `start` to `stop` - 1; in a sequence of slices they are computed ahead."""
        if stop - start > _CHUNK:
            return list(chain.from_iterable(self[at : min(at + _CHUNK, stop)] for at in range(start, stop, _CHUNK)))
        begin, block = self.__dict__.get("_block", (stop, []))  # the samples computed last
        if start < begin or stop > begin + len(block):
            ahead = start + _CHUNK if begin <= start <= begin + len(block) else stop
            begin, [block] = start, permute_spans([self], [[(start, min(max(stop, ahead), self.size))]])
            self.__dict__["_block"] = begin, block
        return block[start - begin : stop - begin]

    def _permute(self, position: int) -> int:
        """The sample at a position, an integer of any size."""
        image = self._map(position)
        while image >= self.size:
            image = self._map(image)
        return image

    def _map(self, image: int) -> int:
        """Map one number of 0 ... left x right - 1 to another.

        Each round adds a hash of one half to the other, which is invertible, so the result is a permutation.
        """
        left_size, right_size = self._radix
        left, right = divmod(image, right_size)
        for odd, even in self._round_keys:
            mixed = (right ^ odd) * _FIRST_MULTIPLIER & _WORD
            left = (left + ((mixed ^ mixed >> 29) * _SECOND_MULTIPLIER >> 24)) % left_size
            mixed = (left ^ even) * _FIRST_MULTIPLIER & _WORD
            right = (right + ((mixed ^ mixed >> 29) * _SECOND_MULTIPLIER >> 24)) % right_size
        return left * right_size + right


def permute_spans(orders: Sequence[SamplePermutation], spans: Sequence[Iterable[tuple[int, int]]]) -> list[list[int]]:
    """For each order the samples at positions start ... stop - 1 of its spans (start, stop), all in one computation.

    The orders are of the same size, such as those of the epochs of a run.

    Raises:
        IndexError: a span is outside 0 ... size.
    """
    ranges = [
        [range(*order._resolve_slice(slice(*span))) for span in own] for order, own in zip(orders, spans, strict=True)
    ]
    counts = [sum(map(len, own)) for own in ranges]
    if sum(counts) <= _FEW or orders[0].size > _MAX_ARRAY_SIZE:
        return [
            [order._permute(position) for positions in own for position in positions]
            for order, own in zip(orders, ranges, strict=True)
        ]
    import numpy

    arrays = [numpy.arange(each.start, each.stop, dtype=numpy.uint64) for own in ranges for each in own]
    samples = _permute_array(orders, counts, numpy.concatenate(arrays)).tolist()
    return [samples[start:stop] for start, stop in pairwise(accumulate(counts, initial=0))]


def _permute_array(orders: Sequence[SamplePermutation], counts: Sequence[int], positions: Any) -> Any:
    """The samples at the positions, of which the first counts[0] belong to the first order, and so on."""
    import numpy

    owners = numpy.repeat(numpy.arange(len(orders)), counts)
    images = _map_array(orders, owners, positions)
    outside = numpy.flatnonzero(images >= orders[0].size)
    while len(outside) > _FEW:
        images[outside] = _map_array(orders, owners[outside], images[outside])
        outside = outside[images[outside] >= orders[0].size]
    for index in outside.tolist():
        images[index] = orders[owners[index]]._permute(int(images[index]))
    return images


def _map_array(orders: Sequence[SamplePermutation], owners: Any, images: Any) -> Any:
    """As `SamplePermutation._map` for each element of a uint64 array, which belongs to the order orders[owner]."""
    import numpy

    left_size, right_size = (numpy.uint64(size) for size in orders[0]._radix)
    keys = numpy.array([order._round_keys for order in orders], numpy.uint64).transpose(1, 2, 0)
    left, right = numpy.divmod(images, right_size)
    for odd, even in keys:
        left = _add_hash(left, right, odd if len(orders) == 1 else odd[owners], left_size)
        right = _add_hash(right, left, even if len(orders) == 1 else even[owners], right_size)
    left *= right_size
    left += right
    return left


def _add_hash(one: Any, other: Any, key: Any, size: Any) -> Any:
    """(one + (h x second multiplier >> 24)) mod size, h the hash of `other`, for uint64 arrays.

    Products wrap at 64 bits, so the last one, of up to 128 bits, is the sum of three: with h = high x 2^24 + low and
    the multiplier = upper x 2^24 + lower, it is high x multiplier + low x upper + (low x lower >> 24).
    """
    import numpy

    word = numpy.uint64
    high = other ^ key
    high *= word(_FIRST_MULTIPLIER)
    high ^= high >> word(29)
    low = high & word(_LOW_BITS)
    high >>= word(24)
    high *= word(_SECOND_MULTIPLIER) % size
    high += one
    carry = low * word(_SECOND_MULTIPLIER & _LOW_BITS)
    carry >>= word(24)
    high += carry
    low *= word(_SECOND_MULTIPLIER >> 24) % size
    high += low
    high %= size
    return high


def _split_digest(digest: bytes) -> tuple[int, int]:
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
