"""`launcher watch`: show a run that another process executes.

New lines of the run's files are passed to the console sink, which shows them as in the run itself. Nothing is written
into the run directory. Whether the run is still alive is checked rarely, and only while no lines arrive: the check
holds the lock of the directory for a moment (a starting run retries for longer than that), and the Slurm queue is
expensive to query.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from launcher.cli import control
from launcher.cli.control import LIFECYCLE_EVENTS, find_run, format_failure, status_line
from launcher.errors import EXIT_OK
from launcher.run_dir.lock import LockOwner, find_lock_owner
from launcher.run_dir.metrics_reader import POSITION_FIELDS
from launcher.run_dir.restart_cost import read_last_row
from launcher.run_dir.run_directory import RunDirectory
from launcher.slurm.queue import SlurmJob
from launcher.system.formatting import encodable
from launcher.system.processes import is_running
from launcher.telemetry.records import Event, MetricsRow
from launcher.telemetry.sinks.console import ConsoleSink

__all__ = ["JsonlTail", "LiveView", "find_owner", "follow_run", "watch_run"]

WATCH_POLL_INTERVAL_S = 0.25
#: Seconds without new lines before checking who runs it, and between two such checks.
OWNER_QUERY_INTERVAL_S = 2.0
SLURM_QUERY_INTERVAL_S = 10.0

RunOwner = SlurmJob | LockOwner | None


def watch_run(run: str, stream: TextIO | None = None) -> int:
    """Show a run until it ends, or until Ctrl-C, which stops watching but not the run.

    Raises:
        UsageError: there is no such run.
    """
    screen = LiveView(find_run(run), stream or sys.stdout)
    try:
        follow_run(screen)
    except KeyboardInterrupt:
        screen.print_line(
            f"stopped watching {screen.run_dir.path}: type launcher stop {shlex.quote(run)} to save and stop the run"
        )
    return EXIT_OK


def follow_run(
    screen: LiveView,
    who_runs: Callable[[RunDirectory, RunOwner], RunOwner] | None = None,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Show updates until the run is done, or no process runs it any more."""
    run_dir, ask = screen.run_dir, who_runs or find_owner
    who = ask(run_dir, None)
    if who is None and run_dir.read_done() is None:
        return screen.print_line(status_line(run_dir, who))
    screen.poll()
    new_s = asked_s = clock()
    misses = 0
    goes_on = screen.ended == "done"  # done before, yet a process holds it: a new start follows
    while who is not None and (screen.ended != "done" or goes_on):
        screen.print_waiting_reason(who)
        wait(WATCH_POLL_INTERVAL_S)
        if clock() - max(new_s, asked_s) >= (
            SLURM_QUERY_INTERVAL_S if isinstance(who, SlurmJob) else OWNER_QUERY_INTERVAL_S
        ):
            found, asked_s = ask(run_dir, who), clock()
            misses = misses + 1 if found is None else 0
            who = who if isinstance(who, SlurmJob) and misses == 1 else found  # a busy queue may fail to answer once
        if screen.poll():
            new_s = clock()
        goes_on = goes_on and screen.ended == "done"
    return screen.close() if screen.ended == "done" else screen.print_line(status_line(run_dir, None))


def find_owner(run_dir: RunDirectory, before: RunOwner) -> RunOwner:
    """Find who runs it. Between worker restarts the user's torchrun holds no lock, so its process is checked."""
    who = control.slurm_job_of(run_dir) or find_lock_owner(run_dir)
    if (
        who is None
        and isinstance(before, LockOwner)
        and before.is_local
        and before.torchrun
        and is_running(before.torchrun)
    ):
        return before
    return who


class LiveView:
    """Shows a run from its latest start on, with a new console per start, as in the training process."""

    def __init__(self, run_dir: RunDirectory, stream: TextIO, env: Mapping[str, str] = os.environ) -> None:
        self.run_dir = run_dir
        self.ended: str | None = None
        self._stream, self._env = stream, env
        self._console = ConsoleSink(stream, env)
        self._rows, self._events = JsonlTail(run_dir.metrics, POSITION_FIELDS), JsonlTail(run_dir.events)
        starts = [event for event in JsonlTail(run_dir.events).read_new_objects() if event.get("event") == "start"]
        self._from = get_generation(starts[-1]) if starts else 0
        self._generation = 0
        self._now = get_position(read_last_row(run_dir.metrics) or {})
        self._said = ""

    def poll(self) -> bool:
        """Show the lines added since the last call; return whether there were any.

        Events are read first, so that the rows written before an event are already available.
        """
        events = deque(self._events.read_new_objects())
        something = bool(events)
        for row in self._rows.read_new_objects():
            something = True
            if get_generation(row) > self._generation:  # the start event was written before this row
                events.extend(self._events.read_new_objects())
            while events and (events[0]["time"] <= row["time"] or get_generation(row) > self._generation):
                self._handle_event(events.popleft())
            self._handle_row(row)
        for event in events:
            self._handle_event(event)
        return something

    def print_waiting_reason(self, who: RunOwner) -> None:
        """Print, once per reason, why there is nothing to show yet."""
        queued = isinstance(who, SlurmJob) and who.is_pending
        said = f"queued {who}" if queued else "" if self._generation else "starting"
        if said and said != self._said:
            self.print_line(f"{status_line(self.run_dir, who)}; waiting for it to start")
        self._said = said

    def print_line(self, text: str) -> None:
        self.close()
        print(encodable(text, self._stream), file=self._stream, flush=True)

    def close(self) -> None:
        self._console.close()

    def _handle_event(self, facts: Mapping[str, Any]) -> None:
        name = facts.get("event")
        if name == "start" and get_generation(facts) >= self._from:
            self._console.close()
            self._console = ConsoleSink(self._stream, self._env)
            self._generation = get_generation(facts)
            facts = {**facts, "run_dir": str(self.run_dir.path)}  # the path as seen from this process
        if self._generation < self._from or not isinstance(name, str):
            return
        if name in LIFECYCLE_EVENTS:
            self.ended = None if name == "start" else name
        self._show_entry(convert_to_event(facts))

    def _handle_row(self, row: Mapping[str, Any]) -> None:
        if get_generation(row) < max(self._from, self._generation):
            return  # a row of an earlier start
        self._console.live = get_position(row) >= self._now
        self._show_entry(convert_to_metrics_row(row))

    def _show_entry(self, entry: Event | MetricsRow) -> None:
        """Show an entry; one with malformed values is skipped, as in the run itself."""
        with suppress(TypeError, ValueError, KeyError, AttributeError):
            self._console.write(entry)


class JsonlTail:
    """Follows a JSONL file and yields the objects of new lines. A line is read once it ends in a newline.

    A truncated or replaced file is read from its beginning; objects that were yielded before are skipped by `time`.
    """

    def __init__(self, path: Path, numbers: Sequence[str] = ("time",)) -> None:
        """`numbers`: the numeric fields that every object must have."""
        self._path, self._numbers = path, numbers
        self._at = self._inode = 0
        self._last = self._known = -math.inf

    def read_new_objects(self) -> Iterator[dict[str, Any]]:
        """Yield the objects added since the last call; nothing if the file does not exist or cannot be read now."""
        try:
            file = self._path.open("rb")
        except OSError:
            return
        with file:
            facts = os.fstat(file.fileno())
            if facts.st_ino != self._inode or facts.st_size < self._at:
                self._inode, self._at, self._known = facts.st_ino, 0, self._last
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._at += len(line)
                found = parse_entry(line, self._numbers)
                if found is not None and found["time"] > self._known:
                    self._last = max(self._last, found["time"])
                    yield found


def parse_entry(line: bytes, numbers: Sequence[str]) -> dict[str, Any] | None:
    """Parse a line; None if it is not an object with these numeric fields."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(found, dict) and all(is_number(found.get(name)) for name in numbers)
    return found if whole else None


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def convert_to_event(facts: Mapping[str, Any]) -> Event:
    """Convert to a console event. The console leaves errors to the driver, so an error is shown as an alarm here."""
    name, rest = facts["event"], {key: value for key, value in facts.items() if key not in ("time", "event")}
    if name == "error":
        return Event(facts["time"], "alarm", {"kind": "error", "detail": format_failure(facts)})
    return Event(facts["time"], name, rest)


def convert_to_metrics_row(row: Mapping[str, Any]) -> MetricsRow:
    """Convert a row back to a MetricsRow; null becomes NaN, which JSON cannot represent."""
    values = {key: math.nan if value is None else value for key, value in row.items() if key not in POSITION_FIELDS}
    figures = {key: value for key, value in values.items() if isinstance(value, int | float)}
    return MetricsRow(**{name: row[name] for name in POSITION_FIELDS}, values=figures)


def get_generation(entry: Mapping[str, Any]) -> int:
    return get_whole_number(entry, "generation")


def get_position(row: Mapping[str, Any]) -> tuple[int, int]:
    return get_generation(row), get_whole_number(row, "update")


def get_whole_number(entry: Mapping[str, Any], name: str) -> int:
    """Return the field as an integer; 0 if it is missing or not a number."""
    found = entry.get(name)
    return int(found) if found is not None and is_number(found) else 0
