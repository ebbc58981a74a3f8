"""Row rate limit for visual sinks (TensorBoard, W&B), where each row costs close to a millisecond."""

from __future__ import annotations

from launcher.reading import Reading

__all__ = ["ROWS_PER_S", "SELDOM_S", "Thinner"]

ROWS_PER_S = 5.0
#: Writing rows in batches is cheaper than one by one, because the CPU caches are warm.
SELDOM_S = 2.0
ALWAYS = ("val/", "elastic/")


class Thinner:
    """Accepts at most `rows_per_s` rows per second of training, plus every validation and every restart."""

    def __init__(self, rows_per_s: float = ROWS_PER_S) -> None:
        self._gap_s = 1.0 / rows_per_s
        self._next_s = float("-inf")
        self._held: Reading | None = None
        self._passed: Reading | None = None

    def passes(self, reading: Reading) -> bool:
        if reading is self._passed:  # the sink retries this row after a failed write
            return True
        passes = due = reading.time >= self._next_s
        if due:
            self._next_s = reading.time + self._gap_s
        else:
            passes = any(key.startswith(ALWAYS) for key in reading.values)
        self._held, self._passed = (None, reading) if passes else (reading, self._passed)
        return passes

    def last(self) -> Reading | None:
        """Return the newest row if it was held back, so that the end of the curve is logged."""
        held, self._held = self._held, None
        return held
