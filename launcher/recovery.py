"""What a restart cost, as metrics.jsonl tells it: the time without training, and the samples that are run again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Restart", "last_row", "totals"]

TAIL_BYTES = 1 << 18
LOST, TIME = "elastic/lost_samples", "elastic/recovery_s"


@dataclass(frozen=True)
class Restart:
    """What was before this start of the workers.

    `since` is when the last finished update ended (UNIX seconds), None where nobody restarted the workers but a person
    began them anew; `lost` are the samples that had been trained on beyond the checkpoint.
    """

    since: float | None = None
    lost: int = 0

    @classmethod
    def after(cls, row: Mapping[str, Any] | None, samples: int, *, restarted: bool) -> Restart:
        """`row`: the last one before; `samples`: where training goes on; `restarted`: within one job."""
        if row is None:
            return cls()
        return cls(row["time"] if restarted else None, max(0, row["samples"] - samples))

    def values(self, now: float) -> dict[str, float]:
        """For the first row after it."""
        if self.since is None:
            return {LOST: self.lost} if self.lost else {}
        return {TIME: max(0.0, now - self.since), LOST: self.lost}


def last_row(metrics: Path) -> dict[str, Any] | None:
    """The last whole row; what a kill cut off is no row."""
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


def totals(metrics: Path) -> dict[str, float]:
    """Over the whole run: seconds between the last update before a restart and the first after it, samples run again.

    What is in no row is not in it: a restart before the first update, and updates that rank 0 had no time to write.
    """
    recovery_s, lost = 0.0, 0
    with metrics.open("rb") as file:
        for line in file:
            if LOST.encode() in line:
                row = json.loads(line)
                recovery_s += row.get(TIME, 0.0)
                lost += int(row[LOST])
    return {"recovery_s": recovery_s, "lost_samples": lost}
