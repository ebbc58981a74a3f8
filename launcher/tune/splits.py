"""The same batch in fewer or more micro-batches: which splits are worth comparing."""

from __future__ import annotations

from launcher.tune.search import LEAST

__all__ = ["ways"]

PARTS = (1, 2, 4)
AWAY = 1 / 8  # relative distance; a divisible size this close below is used instead


def ways(size: int, accumulation: int = 1) -> tuple[tuple[int, int], ...]:
    """The (per_device, accumulation) of the same batch whole, in halves and in quarters, where these are exact.

    An odd size is replaced by the nearest divisible one below. Micro-batches of one sample, which normalisation layers
    reject, are left out. Empty if there is nothing to compare.
    """
    whole = _divisible(size)
    found = [(whole // parts, accumulation * parts) for parts in PARTS if not whole % parts]
    found = [way for way in found if way[0] >= LEAST]
    return tuple(found) if len(found) > 1 else ()


def _divisible(size: int) -> int:
    """The nearest size below that is divisible by four, else by two, if close enough; else the size itself."""
    return next((size - size % parts for parts in (4, 2) if size % parts <= AWAY * size), size)
