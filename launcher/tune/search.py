"""Choose the sizes to try. Deterministic in the results so far, so every rank chooses the same."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

__all__ = ["LEAST", "SMALL", "between", "first", "grown", "largest_next", "refined"]

SMALL = 8  # initial size of the search
GROWTH = math.sqrt(2)
LEAST = 2  # normalisation layers reject a single sample
EIGHT = 8  # tensor cores and vector units prefer multiples of 8
MOST_REFINED = 4


def first(largest: int) -> int:
    """The initial size; smaller if `largest` is small, so that there are sizes to grow through."""
    return max(min(LEAST, largest), min(SMALL, largest // 4))


def grown(size: int, largest: int) -> int | None:
    """The next larger size, at most `largest`; None if that is reached."""
    return None if size >= largest else min(largest, max(size + 1, round(size * GROWTH)))


def between(known: int, size: int) -> Iterator[int]:
    """Intermediate sizes between a working one and a much larger one, each at most twice the previous."""
    while known * 2 < size:
        known *= 2
        yield known


def largest_next(works: int, fails: int | None, largest: int) -> int | None:
    """The next size in the search for the largest working one: double, then bisect. None when it is found."""
    if fails is None:
        return None if works >= largest else min(largest, works * 2)
    return None if fails - works <= 1 else (works + fails) // 2


def refined(knee: int, known: Collection[int], failed: Collection[int], largest: int) -> Sequence[int]:
    """Sizes around the knee not measured yet: the nearest multiples of 8, and halfway to its neighbours."""
    above = min((size for size in known if size > knee), default=None)
    below = max((size for size in known if size < knee), default=None)
    wanted = [knee // EIGHT * EIGHT, -(-knee // EIGHT) * EIGHT]
    wanted.append(round(math.sqrt(knee * below)) if below else knee // 2)
    wanted += [round(math.sqrt(knee * above))] if above else []
    limit = min([largest, *(size - 1 for size in failed)])
    fresh = dict.fromkeys(size for size in wanted if LEAST <= size <= limit and size not in known)
    return sorted(list(fresh)[:MOST_REFINED])
