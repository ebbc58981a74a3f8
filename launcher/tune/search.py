"""Which sizes to try. All of it is arithmetic on what is known so far, so that every rank comes to the same."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

__all__ = ["LEAST", "SMALL", "between", "first", "grown", "largest_next", "refined"]

SMALL = 8  # where the search begins
GROWTH = math.sqrt(2)
LEAST = 2  # one sample is what normalisation layers refuse
EIGHT = 8  # what tensor cores and vector units like a multiple of
MOST_REFINED = 4


def first(largest: int) -> int:
    """Where to begin; with little room further down, so that there is something to grow through."""
    return max(min(LEAST, largest), min(SMALL, largest // 4))


def grown(size: int, largest: int) -> int | None:
    """The next size up, at most `largest`; None where that is reached."""
    return None if size >= largest else min(largest, max(size + 1, round(size * GROWTH)))


def between(known: int, size: int) -> Iterator[int]:
    """Sizes on the way from one that works to a much larger one, each at most twice the one before."""
    while known * 2 < size:
        known *= 2
        yield known


def largest_next(works: int, fails: int | None, largest: int) -> int | None:
    """What to try on the way to the exact largest size that works: doubling, then halving the gap. None: known."""
    if fails is None:
        return None if works >= largest else min(largest, works * 2)
    return None if fails - works <= 1 else (works + fails) // 2


def refined(knee: int, known: Collection[int], failed: Collection[int], largest: int) -> Sequence[int]:
    """Sizes about the knee not measured yet: multiples of 8 beside it, and halfway to its neighbours."""
    above = min((size for size in known if size > knee), default=None)
    below = max((size for size in known if size < knee), default=None)
    wanted = [knee // EIGHT * EIGHT, -(-knee // EIGHT) * EIGHT]
    wanted.append(round(math.sqrt(knee * below)) if below else knee // 2)
    wanted += [round(math.sqrt(knee * above))] if above else []
    limit = min([largest, *(size - 1 for size in failed)])
    fresh = dict.fromkeys(size for size in wanted if LEAST <= size <= limit and size not in known)
    return sorted(list(fresh)[:MOST_REFINED])
