"""`launcher status` and `launcher stop`: query and stop a run that another process or Slurm job executes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_OK, UsageError, format_named_error
from launcher.run_dir.lock import LockOwner, find_lock_owner
from launcher.run_dir.outward_links import refuse_outward_links
from launcher.run_dir.restart_cost import read_last_row
from launcher.run_dir.run_directory import RUNS_DIR, RunDirectory, suggest_runs
from launcher.slurm import queue
from launcher.slurm.claim import read_claim
from launcher.system.formatting import encodable, strip_control_characters
from launcher.system.jsonl import JsonlReader
from launcher.system.run_files import RUN_YAML_FILE

__all__ = [
    "LIFECYCLE_EVENTS",
    "find_run",
    "find_slurm_job",
    "format_failure",
    "format_status",
    "print_status",
    "run_status",
    "run_stop",
    "stop_run",
]

STOP_POLL_INTERVAL_S = 0.1
JOB_POLL_INTERVAL_S = 1.0
STOP_REASON = "launcher stop"  # the stop reason that the run will report
LIFECYCLE_EVENTS = ("start", "preempt", "error", "done")


def run_stop(args: Sequence[str]) -> int:
    """Request that a run save and stop, or with --now kill it without saving."""
    runs = [arg for arg in args if not arg.startswith("-")]
    if len(runs) != 1 or set(args) - {*runs, "--now"}:
        raise UsageError(f"stop {' '.join(args)}: type launcher stop RUN, or launcher stop RUN --now")
    return stop_run(runs[0], now="--now" in args)


def run_status(args: Sequence[str]) -> int:
    """Print the status of a run."""
    if len(args) != 1 or args[0].startswith("-"):
        raise UsageError(f"status takes one run, not {len(args)}: type launcher status RUN")
    return print_status(args[0])


def find_run(run: str) -> RunDirectory:
    """Find the directory of a run given by its name in runs/ or by its path.

    Raises:
        UsageError: there is no such run, or a link leads out of it.
    """
    for path in (Path(run), RUNS_DIR / run):
        run_dir = RunDirectory(path)
        refuse_outward_links(path)
        if run_dir.run_yaml.is_file() or run_dir.slurm_json.is_file():
            return run_dir
    raise UsageError(f"{run} is not a run: {suggest_runs(RUN_YAML_FILE)}")


def find_slurm_job(run_dir: RunDirectory) -> queue.SlurmJob | None:
    """Return the Slurm job that owns the directory, while it is pending or running."""
    claim = read_claim(run_dir)
    return None if claim is None else queue.query_job(str(claim["job"]).partition("_")[0])


def print_stdout(text: str) -> None:
    print(encodable(text, sys.stdout))


def stop_run(run: str, *, now: bool, report: Callable[[str], None] = print_stdout) -> int:
    """Request that a run save and stop, and wait for it; with `now`, kill it without saving.

    Raises:
        UsageError: there is no such run, or with `now` it runs on another machine.
    """
    run_dir = find_run(run)
    if (job := find_slurm_job(run_dir)) is not None:
        return stop_job(run_dir, job, now=now, report=report)
    owner = find_lock_owner(run_dir.path)
    if owner is None:
        report(f"{run_dir.path} is not running: {format_progress(run_dir)}")
        return EXIT_OK
    if now:
        kill_owner(owner, run_dir)
    else:
        run_dir.request_stop(STOP_REASON)
        report(f"{run_dir.path}: asked {owner} to save and stop")
    while find_lock_owner(run_dir.path) is not None:
        time.sleep(STOP_POLL_INTERVAL_S)
    report(f"{run_dir.path} {'ended' if now else 'stopped'}: {format_progress(run_dir)}")
    return EXIT_OK


def stop_job(run_dir: RunDirectory, job: queue.SlurmJob, *, now: bool, report: Callable[[str], None]) -> int:
    """Stop a Slurm job: cancel it if it is pending (nothing is unsaved), else request that it save and stop."""
    if now or job.is_pending:
        queue.cancel_job(job.id)
        report(f"{run_dir.path}: cancelled Slurm job {job.id}")
    else:
        queue.cancel_job(job.id, pending_only=True)  # the pending tasks of a pool
        report(f"{run_dir.path}: asked Slurm job {job.id} to save and stop")
    while (current := queue.query_job(job.id)) is not None:
        if not now and current.is_pending and not job.is_pending:
            queue.cancel_job(job.id)  # it was preempted and requeued after the request
        elif not now and not current.is_pending:
            run_dir.request_stop(STOP_REASON)  # repeated, because a starting run clears old requests
            queue.signal_job(job.id)
        time.sleep(JOB_POLL_INTERVAL_S)
    report(f"{run_dir.path} {'ended' if now else 'stopped'}: {format_progress(run_dir)}")
    return EXIT_OK


def print_status(run: str, report: Callable[[str], None] = print_stdout) -> int:
    """Print the progress of a run and the process or job that runs it.

    Raises:
        UsageError: there is no such run.
    """
    run_dir = find_run(run)
    report(format_status(run_dir, find_slurm_job(run_dir) or find_lock_owner(run_dir.path)))
    return EXIT_OK


def format_status(run_dir: RunDirectory, owner: queue.SlurmJob | LockOwner | None) -> str:
    """Describe what runs the run, and its progress."""
    state = f"is run by {owner} since {owner.since}" if isinstance(owner, LockOwner) else f"is {owner}"
    return f"{run_dir.path} {'is not running' if owner is None else state}: {format_progress(run_dir)}"


def kill_owner(owner: LockOwner, run_dir: RunDirectory) -> None:
    """Kill the driver, or the torchrun that would restart rank 0; the workers are killed along with it."""
    if not owner.is_local:
        raise UsageError(f"stop --now: {run_dir.path} is run by {owner}: type the command there, or omit --now")
    os.kill(owner.torchrun or owner.pid, signal.SIGKILL)


def format_progress(run_dir: RunDirectory) -> str:
    done = run_dir.read_done()
    if done is not None:
        return f"complete, {done['samples']:,} samples in {done['updates']:,} updates"
    row, error = read_last_row(run_dir.metrics), describe_last_error(run_dir)
    if row is None:
        return f"no update finished yet{error}"
    unsaved = "" if any(run_dir.checkpoints.glob("*/manifest.json")) else ", nothing saved"
    return f"at update {row['update']:,}, {row['samples']:,} samples{unsaved}{error}"


def describe_last_error(run_dir: RunDirectory) -> str:
    """Describe the error that ended the last start of the run; empty if it was not an error."""
    event: dict[str, Any] = next(
        (line for line in reversed(read_complete_events(run_dir)) if line.get("event") in LIFECYCLE_EVENTS), {}
    )
    return f"; {format_failure(event)}" if event.get("event") == "error" else ""


def format_failure(event: Mapping[str, Any]) -> str:
    """Format the fields of an `error` event as one line."""
    place = f" in {event['where']}" if event.get("where") else ""
    error = format_named_error(str(event.get("type")), str(event.get("message")))
    return strip_control_characters(f"rank {event.get('rank')} failed{place}: {error}")


def read_complete_events(run_dir: RunDirectory) -> list[dict[str, Any]]:
    """Return the events that were written completely."""
    with suppress(OSError):
        return list(JsonlReader(run_dir.events))
    return []
