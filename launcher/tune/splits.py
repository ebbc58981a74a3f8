"""One batch in fewer or more micro-batches: which divisions are worth comparing."""

from __future__ import annotations

from launcher.tune.search import LEAST

__all__ = ["ways"]

PARTS = (1, 2, 4)
AWAY = 1 / 8  # of the size; a batch so near to one that can be divided stands for it


def ways(size: int, accumulation: int = 1) -> tuple[tuple[int, int], ...]:
    """(per_device, accumulation) of one and the same batch: whole, in halves and in quarters, as far as that is exact.

    An odd size gives way to the nearest one below that can be divided. No micro-batch is of one sample, which
    normalisation layers refuse. Empty where there is nothing to compare.
    """
    whole = _divisible(size)
    found = [(whole // parts, accumulation * parts) for parts in PARTS if not whole % parts]
    found = [way for way in found if way[0] >= LEAST]
    return tuple(found) if len(found) > 1 else ()


def _divisible(size: int) -> int:
    """By four, or else by two, where that is near."""
    return next((size - size % parts for parts in (4, 2) if size % parts <= AWAY * size), size)
