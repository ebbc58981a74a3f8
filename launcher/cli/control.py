"""`launcher status` and `launcher stop`: query and stop a run that another process or Slurm job executes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_OK, UsageError
from launcher.run_dir.failures import read_jsonl
from launcher.run_dir.lock import LockOwner, find_lock_owner
from launcher.run_dir.restart_cost import read_last_row
from launcher.run_dir.run_directory import RUNS_DIR, RunDirectory, suggest_runs
from launcher.slurm import queue
from launcher.slurm.claim import read_claim
from launcher.system.formatting import encodable, strip_control_characters

__all__ = ["LIFECYCLE_EVENTS", "find_run", "format_failure", "print_status", "slurm_job_of", "status_line", "stop_run"]

STOP_POLL_INTERVAL_S = 0.1
JOB_POLL_INTERVAL_S = 1.0
STOP_REASON = "launcher stop"  # the stop reason that the run will report
LIFECYCLE_EVENTS = ("start", "preempt", "error", "done")


def find_run(run: str) -> RunDirectory:
    """Find the directory of a run given by its name in runs/ or by its path.

    Raises:
        UsageError: there is no such run.
    """
    for path in (Path(run), RUNS_DIR / run):
        if (path / "run.yaml").is_file() or (path / "slurm.json").is_file():
            return RunDirectory(path)
    raise UsageError(f"{run} is not a run: {suggest_runs('run.yaml')}")


def slurm_job_of(run_dir: RunDirectory) -> queue.SlurmJob | None:
    """Return the Slurm job that owns the directory, while it is pending or running."""
    kept = read_claim(run_dir)
    return None if kept is None else queue.query_job(str(kept["job"]).partition("_")[0])


def print_stdout(text: str) -> None:
    print(encodable(text, sys.stdout))


def stop_run(run: str, *, now: bool, say: Callable[[str], None] = print_stdout) -> int:
    """Request that a run save and stop, and wait for it; with `now`, kill it without saving.

    Raises:
        UsageError: there is no such run, or with `now` it runs on another machine.
    """
    run_dir = find_run(run)
    if (job := slurm_job_of(run_dir)) is not None:
        return stop_job(run_dir, job, now=now, say=say)
    held = find_lock_owner(run_dir)
    if held is None:
        say(f"{run_dir.path} is not running: {progress_text(run_dir)}")
        return EXIT_OK
    if now:
        kill_owner(held, run_dir)
    else:
        run_dir.request_stop(STOP_REASON)
        say(f"{run_dir.path}: asked {held} to save and stop")
    while find_lock_owner(run_dir) is not None:
        time.sleep(STOP_POLL_INTERVAL_S)
    say(f"{run_dir.path} {'ended' if now else 'stopped'}: {progress_text(run_dir)}")
    return EXIT_OK


def stop_job(run_dir: RunDirectory, job: queue.SlurmJob, *, now: bool, say: Callable[[str], None]) -> int:
    """Stop a Slurm job: cancel it if it is pending (nothing is unsaved), else request that it save and stop."""
    if now or job.is_pending:
        queue.cancel_job(job.id)
        say(f"{run_dir.path}: cancelled Slurm job {job.id}")
    else:
        queue.cancel_job(job.id, waiting=True)  # the pending tasks of a pool
        say(f"{run_dir.path}: asked Slurm job {job.id} to save and stop")
    while (left := queue.query_job(job.id)) is not None:
        if not now and left.is_pending and not job.is_pending:
            queue.cancel_job(job.id)  # it was preempted and requeued after the request
        elif not now and not left.is_pending:
            run_dir.request_stop(STOP_REASON)  # repeated, because a starting run clears old requests
            queue.signal_job(job.id)
        time.sleep(JOB_POLL_INTERVAL_S)
    say(f"{run_dir.path} {'ended' if now else 'stopped'}: {progress_text(run_dir)}")
    return EXIT_OK


def print_status(run: str, say: Callable[[str], None] = print_stdout) -> int:
    """Print the progress of a run and the process or job that runs it.

    Raises:
        UsageError: there is no such run.
    """
    run_dir = find_run(run)
    say(status_line(run_dir, slurm_job_of(run_dir) or find_lock_owner(run_dir)))
    return EXIT_OK


def status_line(run_dir: RunDirectory, who: queue.SlurmJob | LockOwner | None) -> str:
    """Describe who runs the run, and its progress."""
    held = f"is run by {who} since {who.since}" if isinstance(who, LockOwner) else f"is {who}"
    return f"{run_dir.path} {'is not running' if who is None else held}: {progress_text(run_dir)}"


def kill_owner(held: LockOwner, run_dir: RunDirectory) -> None:
    """Kill the driver, or the torchrun that would restart rank 0; the workers are killed along with it."""
    if not held.is_local:
        raise UsageError(f"stop --now: {run_dir.path} is run by {held}: type the command there, or omit --now")
    os.kill(held.torchrun or held.pid, signal.SIGKILL)


def progress_text(run_dir: RunDirectory) -> str:
    done = run_dir.read_done()
    if done is not None:
        return f"complete, {done['samples']:,} samples in {done['updates']:,} updates"
    row, why = read_last_row(run_dir.metrics), describe_last_error(run_dir)
    if row is None:
        return f"no update finished yet{why}"
    kept = "" if any(run_dir.checkpoints.glob("*/manifest.json")) else ", nothing saved"
    return f"at update {row['update']:,}, {row['samples']:,} samples{kept}{why}"


def describe_last_error(run_dir: RunDirectory) -> str:
    """Describe the error that ended the last start of the run; empty if it was not an error."""
    last: dict[str, Any] = next(
        (line for line in reversed(read_complete_events(run_dir)) if line.get("event") in LIFECYCLE_EVENTS), {}
    )
    return f"; {format_failure(last)}" if last.get("event") == "error" else ""


def format_failure(facts: Mapping[str, Any]) -> str:
    """Format the fields of an `error` event as one line."""
    at = f" in {facts['where']}" if facts.get("where") else ""
    return strip_control_characters(f"rank {facts.get('rank')} failed{at}: {facts.get('type')}: {facts.get('message')}")


def read_complete_events(run_dir: RunDirectory) -> list[dict[str, Any]]:
    """Return the events that were written completely."""
    with suppress(OSError):
        return [line for line in read_jsonl(run_dir.events) if isinstance(line, dict)]
    return []
