"""What a run comes to: speed, last and best figures, and where the time of an update went."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.reading import Reading

__all__ = ["Best", "StageShare", "Tally"]

WARM_UP = 3
#: With this many rows the first ones, which start the libraries up, are left out of the stages.
ENOUGH = 10
SMOOTH_S = 20.0


@dataclass(frozen=True)
class StageShare:
    """Milliseconds of an update and their share of its wall time, 0 to 1."""

    stage: str
    ms: float
    share: float


@dataclass(frozen=True)
class Best:
    value: float
    update: int


class Tally:
    """Adds up the rows of one process. Rows after a restart are another process's."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.best: dict[str, Best] = {}
        self.lost_samples = 0
        self.last: Reading | None = None
        self.samples_per_s = 0.0
        self._first: Reading | None = None
        self._rows = 0
        self._warm_up: dict[str, float] = {}
        self._stages: dict[str, float] = {}

    def add(self, reading: Reading) -> None:
        self._speed(reading)
        self._first = self._first or reading
        self.last = reading
        self._rows += 1
        self.values.update(reading.values)
        self.lost_samples += int(reading.values.get("elastic/lost_samples", 0))
        sums = self._warm_up if self._rows <= WARM_UP else self._stages
        for key, value in reading.values.items():
            if key.startswith("stage/") and key.endswith("/ms"):
                sums[key] = sums.get(key, 0.0) + value
            elif key.startswith("val/"):
                self._judge(key, value, reading.update)

    @property
    def mean_samples_per_s(self) -> float | None:
        """From the first row to the last, everything included."""
        if self._first is None or self.last is None or self.last.time <= self._first.time:
            return None
        return (self.last.samples - self._first.samples) / (self.last.time - self._first.time)

    @property
    def updates(self) -> int:
        """The updates that `stages` is about."""
        return self._rows - WARM_UP if self._rows > ENOUGH else self._rows

    def stages(self) -> list[StageShare]:
        """The mean update's stages, the longest first; those that took no time are left out."""
        sums = dict(self._stages)
        if self._rows <= ENOUGH:
            for key, value in self._warm_up.items():
                sums[key] = sums.get(key, 0.0) + value
        total = sum(sums.values())
        shares = [
            StageShare(key.split("/")[1], ms / self.updates, ms / total)
            for key, ms in sums.items()
            if ms > 0 and math.isfinite(total)
        ]
        return sorted(shares, key=lambda share: -share.ms)

    def _speed(self, reading: Reading) -> None:
        """The present speed, smoothed over some seconds; for the time that is left."""
        if self.last is None or reading.time <= self.last.time:
            return
        passed_s = reading.time - self.last.time
        now = (reading.samples - self.last.samples) / passed_s
        weight = 1.0 if self.samples_per_s == 0 else passed_s / (passed_s + SMOOTH_S)
        # The first rows come at any speed: an average over all so far, until that is the slower to follow.
        weight = max(weight, 1.0 / self._rows)
        self.samples_per_s += weight * (now - self.samples_per_s)

    def _judge(self, key: str, value: float, update: int) -> None:
        """The best value of a metric whose direction its name tells."""
        known = self.best.get(key)
        lower, higher = "loss" in key or "error" in key, "acc" in key
        if (lower or higher) and (known is None or (value < known.value if lower else value > known.value)):
            self.best[key] = Best(value, update)
