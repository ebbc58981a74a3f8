"""What Slurm knows of a job, and which job a run folder belongs to."""

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
    """A job that Slurm has not done with: its state, where it runs, the time it has left, and why it waits."""

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
    """What the queue shows of a job; None where it has ended, or nobody can be asked."""
    lines = asked(["squeue", "--noheader", f"--jobs={job}", "--format=%i|%T|%N|%L|%r"]).splitlines()
    found = [Queued(job, *line.split("|", 4)[1:]) for line in lines if line.count("|") >= 4]
    found = [one for one in found if one.state not in ENDED]
    return min(found, key=lambda one: one.waits, default=None)


def cancel(job: str, *, waiting: bool = False) -> None:
    """The job, or only what of it `waiting` to start."""
    asked(["scancel", *(["--state=PENDING"] if waiting else []), job])


def warn(job: str) -> None:
    """USR1 to the workers: save and stop."""
    asked(["scancel", "--quiet", "--signal=USR1", job])


def asked(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


# --- which job a folder belongs to --------------------------------------------------------------------------------


def claimed(folder: RunFolder) -> dict[str, Any] | None:
    """`job`, and `newest`: the checkpoint that was there before it. None where no job has the folder."""
    try:
        kept = json.loads(folder.slurm_json.read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(kept, dict) and JOB.fullmatch(str(kept.get("job")))
    return kept if known else None


def claim(folder: RunFolder, job: str, newest: str | None) -> None:
    """The folder is the job's from now on. At a later start of the same job `newest` stays what it was."""
    before = claimed(folder)
    if before is not None and before["job"] == job:
        newest = before.get("newest")
    write_whole(folder.slurm_json, json.dumps({"job": job, "newest": newest}) + "\n")
