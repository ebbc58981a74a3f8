"""Choose the sizes to try. Deterministic in the results so far, so every rank chooses the same."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

__all__ = [
    "INITIAL_SIZE",
    "MIN_SIZE",
    "choose_initial_size",
    "choose_next_size",
    "choose_next_size_up",
    "choose_sizes_around_knee",
    "iter_intermediate_sizes",
]

INITIAL_SIZE = 8  # initial size of the search
GROWTH_FACTOR = math.sqrt(2)
MIN_SIZE = 2  # normalisation layers reject a single sample
SIZE_MULTIPLE = 8  # tensor cores and vector units prefer multiples of 8
MAX_REFINED_SIZES = 4


def choose_initial_size(largest: int) -> int:
    """The initial size; smaller if `largest` is small, so that there are sizes to grow through."""
    return max(min(MIN_SIZE, largest), min(INITIAL_SIZE, largest // 4))


def choose_next_size_up(size: int, largest: int) -> int | None:
    """The next larger size, at most `largest`; None if that is reached."""
    return None if size >= largest else min(largest, max(size + 1, round(size * GROWTH_FACTOR)))


def iter_intermediate_sizes(working: int, size: int) -> Iterator[int]:
    """Intermediate sizes between a working one and a much larger one, each at most twice the previous."""
    while working * 2 < size:
        working *= 2
        yield working


def choose_next_size(works: int, fails: int | None, largest: int) -> int | None:
    """The next size in the search for the largest working one: double, then bisect. None when it is found."""
    if fails is None:
        return None if works >= largest else min(largest, works * 2)
    return None if fails - works <= 1 else (works + fails) // 2


def choose_sizes_around_knee(knee: int, timed: Collection[int], failed: Collection[int], largest: int) -> Sequence[int]:
    """Sizes around the knee not measured yet: the nearest multiples of 8, and halfway to its neighbours."""
    above = min((size for size in timed if size > knee), default=None)
    below = max((size for size in timed if size < knee), default=None)
    candidates = [knee // SIZE_MULTIPLE * SIZE_MULTIPLE, -(-knee // SIZE_MULTIPLE) * SIZE_MULTIPLE]
    candidates.append(round(math.sqrt(knee * below)) if below else knee // 2)
    candidates += [round(math.sqrt(knee * above))] if above else []
    limit = min([largest, *(size - 1 for size in failed)])
    untimed = dict.fromkeys(size for size in candidates if MIN_SIZE <= size <= limit and size not in timed)
    return sorted(list(untimed)[:MAX_REFINED_SIZES])
