"""The same batch in fewer or more micro-batches: which splits are worth comparing."""

from __future__ import annotations

from launcher.tune.size_search import MIN_SIZE

__all__ = ["accumulation_splits"]

SPLIT_DIVISORS = (1, 2, 4)
MAX_ROUNDING_DISTANCE = 1 / 8  # relative distance; a divisible size this close below is used instead


def accumulation_splits(size: int, accumulation: int = 1) -> tuple[tuple[int, int], ...]:
    """The (per_device, accumulation) of the same batch whole, in halves and in quarters, where these are exact.

    An odd size is replaced by the nearest divisible one below. Micro-batches of one sample, which normalisation layers
    reject, are left out. Empty if there is nothing to compare.
    """
    whole = _round_to_divisible(size)
    found = [(whole // parts, accumulation * parts) for parts in SPLIT_DIVISORS if not whole % parts]
    found = [way for way in found if way[0] >= MIN_SIZE]
    return tuple(found) if len(found) > 1 else ()


def _round_to_divisible(size: int) -> int:
    """The nearest size below that is divisible by four, else by two, if close enough; else the size itself."""
    return next((size - size % parts for parts in (4, 2) if size % parts <= MAX_ROUNDING_DISTANCE * size), size)
