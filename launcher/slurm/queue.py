"""The state of a Slurm job in the queue, and the commands that cancel or signal it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SlurmJob", "cancel_job", "query_job", "signal_job"]

ENDED_STATES = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "REVOKED")
)
COMMAND_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class SlurmJob:
    """A pending or running Slurm job: state, nodes, time left, and the reason why it is pending."""

    id: str
    state: str
    nodes: str
    time_left: str
    reason: str

    @property
    def is_pending(self) -> bool:
        return self.state == "PENDING"

    def __str__(self) -> str:
        if self.is_pending:
            return f"Slurm job {self.id}, PENDING ({self.reason})"
        return f"Slurm job {self.id}, {self.state} on {self.nodes}, {self.time_left} left"


def query_job(job: str) -> SlurmJob | None:
    """Query a job with squeue; None if it has ended or squeue is not available."""
    lines = run_slurm_command(["squeue", "--noheader", f"--jobs={job}", "--format=%i|%T|%N|%L|%r"]).splitlines()
    tasks = [SlurmJob(job, *line.split("|", 4)[1:]) for line in lines if line.count("|") >= 4]
    alive = [task for task in tasks if task.state not in ENDED_STATES]
    return min(alive, key=lambda task: task.is_pending, default=None)


def cancel_job(job: str, *, pending_only: bool = False) -> None:
    """Cancel the job; `pending_only`: only its pending tasks."""
    run_slurm_command(["scancel", *(["--state=PENDING"] if pending_only else []), job])


def signal_job(job: str) -> None:
    """Send SIGUSR1 to the workers, which makes them save and stop."""
    run_slurm_command(["scancel", "--quiet", "--signal=USR1", job])


def run_slurm_command(argv: Sequence[str]) -> str:
    try:
        completed = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return completed.stdout if completed.returncode == 0 else ""
