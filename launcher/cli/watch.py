"""`launcher watch`: show a run that another process executes.

New lines of the run's files are passed to the console sink, which shows them as in the run itself. Nothing is written
into the run directory. Whether the run is still alive is checked rarely, and only while no lines arrive: the check
holds the lock of the directory for a moment (a starting run retries for longer than that), and the Slurm queue is
expensive to query.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

from launcher.cli import control
from launcher.cli.control import LIFECYCLE_EVENTS, find_run, format_failure, format_status
from launcher.errors import EXIT_OK, UsageError
from launcher.run_dir.lock import LockOwner, find_lock_owner
from launcher.run_dir.metrics_reader import POSITION_FIELDS
from launcher.run_dir.restart_cost import read_last_row
from launcher.run_dir.run_directory import RunDirectory
from launcher.slurm.queue import SlurmJob
from launcher.system.formatting import encodable
from launcher.system.jsonl import JsonlTail, is_number
from launcher.system.processes import is_running
from launcher.telemetry.records import Event, MetricsRow
from launcher.telemetry.sinks.console import ConsoleSink

__all__ = ["LiveView", "find_owner", "follow_run", "run_watch", "watch_run"]

WATCH_POLL_INTERVAL_S = 0.25
#: Seconds without new lines before checking what runs it, and between two such checks.
OWNER_QUERY_INTERVAL_S = 2.0
SLURM_QUERY_INTERVAL_S = 10.0

RunOwner = SlurmJob | LockOwner | None


def run_watch(args: Sequence[str]) -> int:
    """Show the live metrics of a run."""
    if len(args) != 1 or args[0].startswith("-"):
        raise UsageError(f"watch takes one run, not {' '.join(args) or 'none'}: type launcher watch RUN")
    return watch_run(args[0])


def watch_run(run: str, stream: TextIO | None = None) -> int:
    """Show a run until it ends, or until Ctrl-C, which stops watching but not the run.

    Raises:
        UsageError: there is no such run.
    """
    view = LiveView(find_run(run), stream or sys.stdout)
    try:
        follow_run(view)
    except KeyboardInterrupt:
        view.print_line(
            f"stopped watching {view.run_dir.path}: type launcher stop {shlex.quote(run)} to save and stop the run"
        )
    return EXIT_OK


def follow_run(
    view: LiveView,
    query: Callable[[RunDirectory, RunOwner], RunOwner] | None = None,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Show updates until the run is done, or no process runs it any more."""
    run_dir, query_owner = view.run_dir, query or find_owner
    owner = query_owner(run_dir, None)
    if owner is None and run_dir.read_done() is None:
        return view.print_line(format_status(run_dir, owner))
    view.poll()
    last_line_s = last_query_s = clock()
    misses = 0
    restarts = view.ended == "done"  # it was done before, yet a process holds it: a new start follows
    while owner is not None and (view.ended != "done" or restarts):
        view.print_waiting_reason(owner)
        wait(WATCH_POLL_INTERVAL_S)
        interval_s = SLURM_QUERY_INTERVAL_S if isinstance(owner, SlurmJob) else OWNER_QUERY_INTERVAL_S
        if clock() - max(last_line_s, last_query_s) >= interval_s:
            answer, last_query_s = query_owner(run_dir, owner), clock()
            misses = misses + 1 if answer is None else 0
            if not (isinstance(owner, SlurmJob) and misses == 1):  # a busy queue may fail to answer once
                owner = answer
        if view.poll():
            last_line_s = clock()
        restarts = restarts and view.ended == "done"
    return view.close() if view.ended == "done" else view.print_line(format_status(run_dir, None))


def find_owner(run_dir: RunDirectory, previous: RunOwner) -> RunOwner:
    """Find what runs it. Between worker restarts the user's torchrun holds no lock, so its process is checked."""
    owner = control.find_slurm_job(run_dir) or find_lock_owner(run_dir.path)
    if owner is None and isinstance(previous, LockOwner) and previous.is_local and previous.torchrun:
        return previous if is_running(previous.torchrun) else None
    return owner


class LiveView:
    """Shows a run from its latest start on, with a new console per start, as in the training process."""

    def __init__(self, run_dir: RunDirectory, stream: TextIO, env: Mapping[str, str] = os.environ) -> None:
        self.run_dir = run_dir
        self.ended: str | None = None
        self._stream, self._env = stream, env
        self._console = ConsoleSink(stream, env)
        self._rows, self._events = JsonlTail(run_dir.metrics, POSITION_FIELDS), JsonlTail(run_dir.events)
        starts = [event for event in JsonlTail(run_dir.events).read_new_objects() if event.get("event") == "start"]
        self._first_generation = get_generation(starts[-1]) if starts else 0
        self._generation = 0
        self._start_position = get_position(read_last_row(run_dir.metrics) or {})
        self._waiting_reason = ""

    def poll(self) -> bool:
        """Show the lines added since the last call; return whether there were any.

        Events are read first, so that the rows written before an event are already available.
        """
        events = deque(self._events.read_new_objects())
        has_new_lines = bool(events)
        for row in self._rows.read_new_objects():
            has_new_lines = True
            if get_generation(row) > self._generation:  # the start event was written before this row
                events.extend(self._events.read_new_objects())
            while events and (events[0]["time"] <= row["time"] or get_generation(row) > self._generation):
                self._handle_event(events.popleft())
            self._handle_row(row)
        for event in events:
            self._handle_event(event)
        return has_new_lines

    def print_waiting_reason(self, owner: RunOwner) -> None:
        """Print, once per reason, why there is nothing to show yet."""
        is_queued = isinstance(owner, SlurmJob) and owner.is_pending
        reason = f"queued {owner}" if is_queued else "" if self._generation else "starting"
        if reason and reason != self._waiting_reason:
            self.print_line(f"{format_status(self.run_dir, owner)}; waiting for it to start")
        self._waiting_reason = reason

    def print_line(self, text: str) -> None:
        self.close()
        print(encodable(text, self._stream), file=self._stream, flush=True)

    def close(self) -> None:
        self._console.close()

    def _handle_event(self, event: Mapping[str, Any]) -> None:
        name = event.get("event")
        if name == "start" and get_generation(event) >= self._first_generation:
            self._console.close()
            self._console = ConsoleSink(self._stream, self._env)
            self._generation = get_generation(event)
            event = {**event, "run_dir": str(self.run_dir.path)}  # the path as seen from this process
        if self._generation < self._first_generation or not isinstance(name, str):
            return
        if name in LIFECYCLE_EVENTS:
            self.ended = None if name == "start" else name
        self._show_entry(convert_to_event(event))

    def _handle_row(self, row: Mapping[str, Any]) -> None:
        if get_generation(row) < max(self._first_generation, self._generation):
            return  # a row of an earlier start
        self._console.live = get_position(row) >= self._start_position
        self._show_entry(convert_to_metrics_row(row))

    def _show_entry(self, entry: Event | MetricsRow) -> None:
        """Show an entry; one with malformed values is skipped, as in the run itself."""
        with suppress(TypeError, ValueError, KeyError, AttributeError):
            self._console.write(entry)


def convert_to_event(entry: Mapping[str, Any]) -> Event:
    """Convert to a console event. The console leaves errors to the driver, so an error is shown as an alarm here."""
    fields = {key: value for key, value in entry.items() if key not in ("time", "event")}
    if entry["event"] == "error":
        return Event(entry["time"], "alarm", {"kind": "error", "detail": format_failure(entry)})
    return Event(entry["time"], entry["event"], fields)


def convert_to_metrics_row(row: Mapping[str, Any]) -> MetricsRow:
    """Convert a row back to a MetricsRow; null becomes NaN, which JSON cannot represent."""
    values = {key: math.nan if value is None else value for key, value in row.items() if key not in POSITION_FIELDS}
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    return MetricsRow(**{name: row[name] for name in POSITION_FIELDS}, values=numbers)


def get_generation(entry: Mapping[str, Any]) -> int:
    return get_whole_number(entry, "generation")


def get_position(row: Mapping[str, Any]) -> tuple[int, int]:
    return get_generation(row), get_whole_number(row, "update")


def get_whole_number(entry: Mapping[str, Any], name: str) -> int:
    """Return the field as an integer; 0 if it is missing or not a number."""
    value = entry.get(name, 0)
    return int(value) if is_number(value) else 0
