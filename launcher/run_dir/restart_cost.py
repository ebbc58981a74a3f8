"""Cost of a restart, computed from metrics.jsonl: time without training, and samples trained again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["RestartCost", "read_last_row", "sum_restart_costs"]

TAIL_BYTES = 1 << 18
LOST, TIME = "elastic/lost_samples", "elastic/recovery_s"


@dataclass(frozen=True)
class RestartCost:
    """Time and samples lost before this start of the workers.

    `since` is the end of the last finished update (UNIX seconds), or None if the workers were started by a new command
    rather than restarted. `lost` counts the samples trained after the checkpoint, which are trained again.
    """

    since: float | None = None
    lost: int = 0

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
            return {LOST: self.lost} if self.lost else {}
        return {TIME: max(0.0, now - self.since), LOST: self.lost}


def read_last_row(metrics: Path) -> dict[str, Any] | None:
    """Return the last complete row; a line truncated by a kill is ignored."""
    try:
        with metrics.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
            file.seek(start)
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines[1 if start else 0 :]):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"time", "samples"} <= row.keys():
            return row
    return None


def sum_restart_costs(metrics: Path) -> dict[str, float]:
    """Sum over the run: seconds from the last update before a restart to the first after it, and samples trained again.

    Events without a row are not counted: a restart before the first update, and updates that rank 0 could not write.
    """
    recovery_s, lost = 0.0, 0
    with metrics.open("rb") as file:
        for line in file:
            if LOST.encode() in line:
                row = json.loads(line)
                recovery_s += row.get(TIME, 0.0)
                lost += int(row[LOST])
    return {"recovery_s": recovery_s, "lost_samples": lost}
