"""The rate limit of rows for slow sinks."""

from __future__ import annotations

from launcher.telemetry.records import MetricsRow
from launcher.telemetry.sinks.rate_limit import RowRateLimiter


def test_rate_limiter_keeps_important_rows() -> None:
    limiter, accepted = RowRateLimiter(rows_per_s=1), []
    for update in range(1, 20):  # eight updates a second
        values: dict[str, float] = {7: {"val/loss": 1.0}, 12: {"elastic/lost_samples": 64.0}}.get(
            update, {"lr/value": 1.0}
        )
        row = MetricsRow(update / 8, update, update, 0, 1, 1, values)
        accepted += [update] if limiter.accept(row) else []
    assert accepted == [1, 7, 9, 12, 17]
    last = limiter.get_held_row()
    assert last is not None
    assert last.update == 19
    assert limiter.get_held_row() is None


def test_rate_limiter_accepts_retried_row() -> None:
    limiter, row = RowRateLimiter(), MetricsRow(1.0, 1, 1, 0, 1, 1, {})
    assert limiter.accept(row)
    assert limiter.accept(row)
    assert not limiter.accept(MetricsRow(1.01, 2, 2, 0, 1, 1, {}))


def test_rate_limiter_keeps_slow_rows() -> None:
    limiter = RowRateLimiter(rows_per_s=5)
    assert all(limiter.accept(MetricsRow(update * 0.25, update, update, 0, 1, 1, {})) for update in range(100))
