"""Cost of a restart, computed from metrics.jsonl: time without training, and samples trained again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.system.jsonl import JsonlReader, iter_jsonl_backwards

__all__ = ["RestartCost", "read_last_row", "sum_restart_costs"]

LOST_SAMPLES_KEY, RECOVERY_KEY = "elastic/lost_samples", "elastic/recovery_s"


@dataclass(frozen=True)
class RestartCost:
    """Time and samples lost before this start of the workers.

    `since` is the end of the last finished update (UNIX seconds), or None if the workers were started by a new command
    rather than restarted. `lost_samples` counts the samples trained after the checkpoint, which are trained again.
    """

    since: float | None = None
    lost_samples: int = 0

    @classmethod
    def from_last_row(cls, row: Mapping[str, Any] | None, samples: int, *, restarted: bool) -> RestartCost:
        """Compute the cost from the last row before the restart and the sample count that training resumes at.

        `restarted`: the workers were restarted within one job.
        """
        if row is None:
            return cls()
        return cls(row["time"] if restarted else None, max(0, row["samples"] - samples))

    def to_metrics(self, now: float) -> dict[str, float]:
        """Return the metrics for the first row after the restart."""
        if self.since is None:
            return {LOST_SAMPLES_KEY: self.lost_samples} if self.lost_samples else {}
        return {RECOVERY_KEY: max(0.0, now - self.since), LOST_SAMPLES_KEY: self.lost_samples}


def read_last_row(metrics: Path) -> dict[str, Any] | None:
    """Return the last complete row; a line truncated by a kill is ignored."""
    with suppress(OSError):
        return next((row for row in iter_jsonl_backwards(metrics) if {"time", "samples"} <= row.keys()), None)
    return None


def sum_restart_costs(metrics: Path) -> dict[str, float]:
    """Sum over the run: seconds from the last update before a restart to the first after it, and samples trained again.

    Events without a row are not counted: a restart before the first update, and updates that rank 0 could not write.
    """
    recovery_s, lost_samples = 0.0, 0
    for row in JsonlReader(metrics, containing=LOST_SAMPLES_KEY):
        recovery_s += row.get(RECOVERY_KEY, 0.0)
        lost_samples += int(row[LOST_SAMPLES_KEY])
    return {"recovery_s": recovery_s, "lost_samples": lost_samples}
