"""Fewer rows for the sinks that are looked at, not computed with: there each row costs close to a millisecond."""

from __future__ import annotations

from launcher.reading import Reading

__all__ = ["ROWS_PER_S", "SELDOM_S", "Thinner"]

ROWS_PER_S = 5.0
#: A batch of rows at a time is cheaper than one by one, with the processor's caches warm.
SELDOM_S = 2.0
ALWAYS = ("val/", "elastic/")


class Thinner:
    """Lets through at most `rows_per_s` rows of a second of training, and every validation and restart."""

    def __init__(self, rows_per_s: float = ROWS_PER_S) -> None:
        self._gap_s = 1.0 / rows_per_s
        self._next_s = float("-inf")
        self._held: Reading | None = None
        self._passed: Reading | None = None

    def passes(self, reading: Reading) -> bool:
        if reading is self._passed:  # asked again, since its first try failed
            return True
        passes = due = reading.time >= self._next_s
        if due:
            self._next_s = reading.time + self._gap_s
        else:
            passes = any(key.startswith(ALWAYS) for key in reading.values)
        self._held, self._passed = (None, reading) if passes else (reading, self._passed)
        return passes

    def last(self) -> Reading | None:
        """The newest row, where it was held back: the end of a curve should be there."""
        held, self._held = self._held, None
        return held
