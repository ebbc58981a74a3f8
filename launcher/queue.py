"""State of a Slurm job in the queue, and which job a run directory belongs to."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.durable import write_whole
from launcher.runfolder import RunFolder

__all__ = ["Queued", "cancel", "claim", "claimed", "look", "warn"]

JOB = re.compile(r"\d+(_\d+)?")
ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "REVOKED")
)
ASK_S = 30.0


@dataclass(frozen=True)
class Queued:
    """A pending or running Slurm job: state, nodes, time left, and the reason why it is pending."""

    id: str
    state: str
    nodes: str
    left: str
    why: str

    @property
    def waits(self) -> bool:
        return self.state == "PENDING"

    def __str__(self) -> str:
        if self.waits:
            return f"Slurm job {self.id}, PENDING ({self.why})"
        return f"Slurm job {self.id}, {self.state} on {self.nodes}, {self.left} left"


def look(job: str) -> Queued | None:
    """Query a job with squeue; None if it has ended or squeue is not available."""
    lines = asked(["squeue", "--noheader", f"--jobs={job}", "--format=%i|%T|%N|%L|%r"]).splitlines()
    found = [Queued(job, *line.split("|", 4)[1:]) for line in lines if line.count("|") >= 4]
    found = [one for one in found if one.state not in ENDED]
    return min(found, key=lambda one: one.waits, default=None)


def cancel(job: str, *, waiting: bool = False) -> None:
    """Cancel the job; `waiting`: only the parts of it that are pending."""
    asked(["scancel", *(["--state=PENDING"] if waiting else []), job])


def warn(job: str) -> None:
    """Send SIGUSR1 to the workers, which makes them save and stop."""
    asked(["scancel", "--quiet", "--signal=USR1", job])


def asked(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


# --- job of a run directory --------------------------------------------------------------------------------------


def claimed(folder: RunFolder) -> dict[str, Any] | None:
    """`job`, and `newest`: the newest checkpoint before the job. None if the directory belongs to no job."""
    try:
        kept = json.loads(folder.slurm_json.read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(kept, dict) and JOB.fullmatch(str(kept.get("job")))
    return kept if known else None


def claim(folder: RunFolder, job: str, newest: str | None) -> None:
    """Assign the directory to the job. A later start of the same job keeps the recorded `newest`."""
    before = claimed(folder)
    if before is not None and before["job"] == job:
        newest = before.get("newest")
    write_whole(folder.slurm_json, json.dumps({"job": job, "newest": newest}) + "\n")
