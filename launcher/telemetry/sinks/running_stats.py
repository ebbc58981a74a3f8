"""Running statistics of a run: speed, latest and best metrics, and time per stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.telemetry.records import MetricsRow

__all__ = ["BestValue", "RunningStats", "StageShare"]

WARMUP_UPDATES = 3
#: Above this many rows, the first WARMUP_UPDATES rows (library start-up) are excluded from the stage times.
MIN_ROWS_TO_SKIP_WARMUP = 10
SPEED_SMOOTHING_S = 20.0


@dataclass(frozen=True)
class StageShare:
    """A stage: its milliseconds per update and its share of the wall time, 0 to 1."""

    stage: str
    ms: float
    share: float


@dataclass(frozen=True)
class BestValue:
    value: float
    update: int


class RunningStats:
    """Accumulates the rows of one process; after a restart a new process starts from zero."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.best: dict[str, BestValue] = {}
        self.lost_samples = 0
        self.last: MetricsRow | None = None
        self.samples_per_s = 0.0
        self._first: MetricsRow | None = None
        self._rows = 0
        self._warm_up: dict[str, float] = {}
        self._stages: dict[str, float] = {}

    def add(self, row: MetricsRow) -> None:
        self._update_speed(row)
        self._first = self._first or row
        self.last = row
        self._rows += 1
        self.values.update(row.values)
        self.lost_samples += int(row.values.get("elastic/lost_samples", 0))
        sums = self._warm_up if self._rows <= WARMUP_UPDATES else self._stages
        for key, value in row.values.items():
            if key.startswith("stage/") and key.endswith("/ms"):
                sums[key] = sums.get(key, 0.0) + value
            elif key.startswith("val/"):
                self._track_best(key, value, row.update)

    @property
    def mean_samples_per_s(self) -> float | None:
        """Average speed between the first and the last row, including all pauses."""
        if self._first is None or self.last is None or self.last.time <= self._first.time:
            return None
        return (self.last.samples - self._first.samples) / (self.last.time - self._first.time)

    @property
    def updates(self) -> int:
        """Number of updates that `compute_stage_shares` averages over."""
        return self._rows - WARMUP_UPDATES if self._rows > MIN_ROWS_TO_SKIP_WARMUP else self._rows

    def compute_stage_shares(self) -> list[StageShare]:
        """Mean time of each stage per update, longest first; stages without any time are omitted."""
        sums = dict(self._stages)
        if self._rows <= MIN_ROWS_TO_SKIP_WARMUP:
            for key, value in self._warm_up.items():
                sums[key] = sums.get(key, 0.0) + value
        total = sum(sums.values())
        shares = [
            StageShare(key.split("/")[1], ms / self.updates, ms / total)
            for key, ms in sums.items()
            if ms > 0 and math.isfinite(total)
        ]
        return sorted(shares, key=lambda share: -share.ms)

    def _update_speed(self, row: MetricsRow) -> None:
        """Update the current speed, smoothed over about 20 s; used to estimate the time left."""
        if self.last is None or row.time <= self.last.time:
            return
        elapsed_s = row.time - self.last.time
        speed = (row.samples - self.last.samples) / elapsed_s
        weight = 1.0 if self.samples_per_s == 0 else elapsed_s / (elapsed_s + SPEED_SMOOTHING_S)
        # The first rows arrive irregularly: use the plain average of all rows as long as it reacts faster.
        weight = max(weight, 1.0 / self._rows)
        self.samples_per_s += weight * (speed - self.samples_per_s)

    def _track_best(self, key: str, value: float, update: int) -> None:
        """Track the best value of a metric whose name shows its direction (loss, error, acc)."""
        best = self.best.get(key)
        lower_is_better, higher_is_better = "loss" in key or "error" in key, "acc" in key
        if math.isnan(value) or not (lower_is_better or higher_is_better):
            return
        if best is None or (value < best.value if lower_is_better else value > best.value):
            self.best[key] = BestValue(value, update)
