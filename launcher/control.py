"""What one may ask of a run that was started elsewhere: where it stands, and to stop."""

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
STOP = "launcher stop"  # why a run stopped, as it will say
ENDINGS = ("start", "preempt", "error", "done")
OWNER = re.compile(r"process (\d+)(?: of torchrun (\d+))? on (\S+) since (.+)")


@dataclass(frozen=True)
class Owner:
    """The process that holds a run folder: the driver, or rank 0 of a torchrun of the user's own, and since when."""

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
    """The folder of a run given by its name in runs/ or by its path.

    Raises:
        RequestError: there is none.
    """
    for path in (Path(run), RUNS / run):
        if (path / "run.yaml").is_file() or (path / "slurm.json").is_file():
            return RunFolder(path)
    raise RequestError(f"{run} is no run: {runs_with('run.yaml')}")


def owner(folder: RunFolder) -> Owner | None:
    """Who holds the folder; None where nobody does. A dead process holds nothing: the kernel let go of its lock."""
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
    """The Slurm job that has the folder, as long as Slurm has not done with it."""
    kept = queue.claimed(folder)
    return None if kept is None else queue.look(str(kept["job"]).partition("_")[0])


def on_screen(text: str) -> None:
    print(printable(text, sys.stdout))


def stop(run: str, *, now: bool, say: Callable[[str], None] = on_screen) -> int:
    """Ask a run to save and stop, and wait until it has; or, `now`, end it without saving.

    Raises:
        RequestError: there is no such run, or `now` cannot reach it.
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
    """The same for a Slurm job: one that waits is cancelled, it holds nothing unsaved; one that runs is asked."""
    if now or job.waits:
        queue.cancel(job.id)
        say(f"{folder.path}: Slurm job {job.id} is cancelled")
    else:
        queue.cancel(job.id, waiting=True)  # the tasks of a pool that have not come yet
        say(f"{folder.path}: asked Slurm job {job.id} to save and stop")
    while (left := queue.look(job.id)) is not None:
        if not now and left.waits and not job.waits:
            queue.cancel(job.id)  # it was preempted while it was asked
        elif not now and not left.waits:
            folder.ask_to_stop(STOP)  # once more each time: a run that has just begun takes an old one away
            queue.warn(job.id)
        time.sleep(ASK_EVERY_S)
    say(f"{folder.path} {'ended' if now else 'stopped'}: {standing(folder)}")
    return EXIT_OK


def status(run: str, say: Callable[[str], None] = on_screen) -> int:
    """Say where a run stands and who runs it.

    Raises:
        RequestError: there is no such run.
    """
    folder = find(run)
    say(told(folder, queued(folder) or owner(folder)))
    return EXIT_OK


def told(folder: RunFolder, who: queue.Queued | Owner | None) -> str:
    """Who runs it, and where it stands."""
    held = f"is run by {who} since {who.since}" if isinstance(who, Owner) else f"is {who}"
    return f"{folder.path} {'is not running' if who is None else held}: {standing(folder)}"


def end(held: Owner, folder: RunFolder) -> None:
    """Kill the driver, or the torchrun above rank 0, which would start it again; their workers die with them."""
    if not held.here:
        raise RequestError(f"stop --now: {folder.path} is run by {held}: type it there, or stop it without --now")
    os.kill(held.torchrun or held.pid, signal.SIGKILL)


def standing(folder: RunFolder) -> str:
    done = folder.read_done()
    if done is not None:
        return f"complete, {done['samples']:,} samples in {done['updates']:,} updates"
    row, why = last_row(folder.metrics), failed(folder)
    if row is None:
        return f"nothing was trained yet{why}"
    kept = "" if any(folder.checkpoints.glob("*/manifest.json")) else ", nothing saved"
    return f"at update {row['update']:,}, {row['samples']:,} samples{kept}{why}"


def failed(folder: RunFolder) -> str:
    """What ended the run's last start, where that was an error."""
    last: dict[str, Any] = next((line for line in reversed(events(folder)) if line.get("event") in ENDINGS), {})
    return f"; {failure_text(last)}" if last.get("event") == "error" else ""


def failure_text(facts: Mapping[str, Any]) -> str:
    """The facts of an `error` event in words."""
    at = f" in {facts['where']}" if facts.get("where") else ""
    return one_line(f"rank {facts.get('rank')} failed{at}: {facts.get('type')}: {facts.get('message')}")


def events(folder: RunFolder) -> list[dict[str, Any]]:
    """Those that were written whole."""
    with suppress(OSError):
        return [line for line in whole_lines(folder.events) if isinstance(line, dict)]
    return []
