"""`launcher status` and `launcher stop`: query and stop a run that another process or Slurm job executes."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import queue
from launcher.errors import EXIT_OK, RequestError
from launcher.failure import whole_lines
from launcher.recovery import last_row
from launcher.runfolder import RUNS, RunFolder, runs_with
from launcher.sinks.text import one_line, printable

__all__ = ["ENDINGS", "Owner", "failure_text", "find", "owner", "queued", "status", "stop", "told"]

LOOK_EVERY_S = 0.1
ASK_EVERY_S = 1.0
STOP = "launcher stop"  # the stop reason that the run will report
ENDINGS = ("start", "preempt", "error", "done")
OWNER = re.compile(r"process (\d+)(?: of torchrun (\d+))? on (\S+) since (.+)")


@dataclass(frozen=True)
class Owner:
    """The process that holds the lock of a run directory: the driver, or rank 0 where the user ran torchrun."""

    pid: int
    host: str
    since: str
    torchrun: int | None = None

    @property
    def here(self) -> bool:
        return self.host == socket.gethostname()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def find(run: str) -> RunFolder:
    """Find the directory of a run given by its name in runs/ or by its path.

    Raises:
        UsageError: there is no such run.
    """
    for path in (Path(run), RUNS / run):
        if (path / "run.yaml").is_file() or (path / "slurm.json").is_file():
            return RunFolder(path)
    raise RequestError(f"{run} is not a run: {runs_with('run.yaml')}")


def owner(folder: RunFolder) -> Owner | None:
    """Return the process that holds the lock; None if it is free. The kernel releases the lock of a dead process."""
    try:
        with (folder.path / ".lock").open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                found = OWNER.match(file.read())
                return owner_of(found) if found else Owner(0, "another machine", "")
    except FileNotFoundError:
        pass
    return None


def owner_of(found: re.Match[str]) -> Owner:
    return Owner(int(found[1]), found[3], found[4], int(found[2]) if found[2] else None)


def queued(folder: RunFolder) -> queue.Queued | None:
    """Return the Slurm job that owns the directory, while it is pending or running."""
    kept = queue.claimed(folder)
    return None if kept is None else queue.look(str(kept["job"]).partition("_")[0])


def on_screen(text: str) -> None:
    print(printable(text, sys.stdout))


def stop(run: str, *, now: bool, say: Callable[[str], None] = on_screen) -> int:
    """Request that a run save and stop, and wait for it; with `now`, kill it without saving.

    Raises:
        UsageError: there is no such run, or with `now` it runs on another machine.
    """
    folder = find(run)
    if (job := queued(folder)) is not None:
        return stop_job(folder, job, now=now, say=say)
    held = owner(folder)
    if held is None:
        say(f"{folder.path} is not running: {standing(folder)}")
        return EXIT_OK
    if now:
        end(held, folder)
    else:
        folder.ask_to_stop(STOP)
        say(f"{folder.path}: asked {held} to save and stop")
    while owner(folder) is not None:
        time.sleep(LOOK_EVERY_S)
    say(f"{folder.path} {'ended' if now else 'stopped'}: {standing(folder)}")
    return EXIT_OK


def stop_job(folder: RunFolder, job: queue.Queued, *, now: bool, say: Callable[[str], None]) -> int:
    """Stop a Slurm job: cancel it if it is pending (nothing is unsaved), else request that it save and stop."""
    if now or job.waits:
        queue.cancel(job.id)
        say(f"{folder.path}: cancelled Slurm job {job.id}")
    else:
        queue.cancel(job.id, waiting=True)  # the pending tasks of a pool
        say(f"{folder.path}: asked Slurm job {job.id} to save and stop")
    while (left := queue.look(job.id)) is not None:
        if not now and left.waits and not job.waits:
            queue.cancel(job.id)  # it was preempted and requeued after the request
        elif not now and not left.waits:
            folder.ask_to_stop(STOP)  # repeated, because a starting run clears old requests
            queue.warn(job.id)
        time.sleep(ASK_EVERY_S)
    say(f"{folder.path} {'ended' if now else 'stopped'}: {standing(folder)}")
    return EXIT_OK


def status(run: str, say: Callable[[str], None] = on_screen) -> int:
    """Print the progress of a run and the process or job that runs it.

    Raises:
        UsageError: there is no such run.
    """
    folder = find(run)
    say(told(folder, queued(folder) or owner(folder)))
    return EXIT_OK


def told(folder: RunFolder, who: queue.Queued | Owner | None) -> str:
    """Describe who runs the run, and its progress."""
    held = f"is run by {who} since {who.since}" if isinstance(who, Owner) else f"is {who}"
    return f"{folder.path} {'is not running' if who is None else held}: {standing(folder)}"


def end(held: Owner, folder: RunFolder) -> None:
    """Kill the driver, or the torchrun that would restart rank 0; the workers are killed along with it."""
    if not held.here:
        raise RequestError(f"stop --now: {folder.path} is run by {held}: type the command there, or omit --now")
    os.kill(held.torchrun or held.pid, signal.SIGKILL)


def standing(folder: RunFolder) -> str:
    done = folder.read_done()
    if done is not None:
        return f"complete, {done['samples']:,} samples in {done['updates']:,} updates"
    row, why = last_row(folder.metrics), failed(folder)
    if row is None:
        return f"no update finished yet{why}"
    kept = "" if any(folder.checkpoints.glob("*/manifest.json")) else ", nothing saved"
    return f"at update {row['update']:,}, {row['samples']:,} samples{kept}{why}"


def failed(folder: RunFolder) -> str:
    """Describe the error that ended the last start of the run; empty if it was not an error."""
    last: dict[str, Any] = next((line for line in reversed(events(folder)) if line.get("event") in ENDINGS), {})
    return f"; {failure_text(last)}" if last.get("event") == "error" else ""


def failure_text(facts: Mapping[str, Any]) -> str:
    """Format the fields of an `error` event as one line."""
    at = f" in {facts['where']}" if facts.get("where") else ""
    return one_line(f"rank {facts.get('rank')} failed{at}: {facts.get('type')}: {facts.get('message')}")


def events(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the events that were written completely."""
    with suppress(OSError):
        return [line for line in whole_lines(folder.events) if isinstance(line, dict)]
    return []
