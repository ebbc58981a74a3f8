"""Row rate limit for visual sinks (TensorBoard, W&B), where each row costs close to a millisecond."""

from __future__ import annotations

from launcher.telemetry.records import MetricsRow

__all__ = ["ROWS_PER_S", "SLOW_SINK_INTERVAL_S", "RowRateLimiter"]

ROWS_PER_S = 5.0
#: Writing rows in batches is cheaper than one by one, because the CPU caches are warm.
SLOW_SINK_INTERVAL_S = 2.0
UNTHROTTLED_PREFIXES = ("val/", "elastic/")


class RowRateLimiter:
    """Accepts at most `rows_per_s` rows per second of training, plus every validation and every restart."""

    def __init__(self, rows_per_s: float = ROWS_PER_S) -> None:
        self._interval_s = 1.0 / rows_per_s
        self._next_s = float("-inf")
        self._held: MetricsRow | None = None
        self._accepted: MetricsRow | None = None

    def accept(self, row: MetricsRow) -> bool:
        if row is self._accepted:  # the sink retries this row after a failed write
            return True
        accepted = row.time >= self._next_s
        if accepted:
            self._next_s = row.time + self._interval_s
        else:
            accepted = any(key.startswith(UNTHROTTLED_PREFIXES) for key in row.values)
        self._held, self._accepted = (None, row) if accepted else (row, self._accepted)
        return accepted

    def get_held_row(self) -> MetricsRow | None:
        """Return the newest row if it was held back, so that the end of the curve is logged."""
        held, self._held = self._held, None
        return held
