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

from launcher import control
from launcher.control import ENDINGS, Owner, failure_text, find, told
from launcher.errors import EXIT_OK
from launcher.history import POSITION
from launcher.process import runs
from launcher.queue import Queued
from launcher.reading import Event, Reading
from launcher.recovery import last_row
from launcher.runfolder import RunFolder
from launcher.sinks.console import Console
from launcher.sinks.text import printable

__all__ = ["Screen", "Tail", "follow", "runner", "watch"]

LOOK_EVERY_S = 0.25
#: Seconds without new lines before checking who runs it, and between two such checks.
ASK_EVERY_S = 2.0
ASK_QUEUE_EVERY_S = 10.0

Who = Queued | Owner | None


def watch(run: str, stream: TextIO | None = None) -> int:
    """Show a run until it ends, or until Ctrl-C, which stops watching but not the run.

    Raises:
        UsageError: there is no such run.
    """
    screen = Screen(find(run), stream or sys.stdout)
    try:
        follow(screen)
    except KeyboardInterrupt:
        screen.say(
            f"stopped watching {screen.folder.path}: type launcher stop {shlex.quote(run)} to save and stop the run"
        )
    return EXIT_OK


def follow(
    screen: Screen,
    who_runs: Callable[[RunFolder, Who], Who] | None = None,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Show updates until the run is done, or no process runs it any more."""
    folder, ask = screen.folder, who_runs or runner
    who = ask(folder, None)
    if who is None and folder.read_done() is None:
        return screen.say(told(folder, who))
    screen.look()
    new_s = asked_s = clock()
    misses = 0
    goes_on = screen.ended == "done"  # done before, yet a process holds it: a new start follows
    while who is not None and (screen.ended != "done" or goes_on):
        screen.waits(who)
        wait(LOOK_EVERY_S)
        if clock() - max(new_s, asked_s) >= (ASK_QUEUE_EVERY_S if isinstance(who, Queued) else ASK_EVERY_S):
            found, asked_s = ask(folder, who), clock()
            misses = misses + 1 if found is None else 0
            who = who if isinstance(who, Queued) and misses == 1 else found  # a busy queue may fail to answer once
        if screen.look():
            new_s = clock()
        goes_on = goes_on and screen.ended == "done"
    return screen.close() if screen.ended == "done" else screen.say(told(folder, None))


def runner(folder: RunFolder, before: Who) -> Who:
    """Find who runs it. Between worker restarts the user's torchrun holds no lock, so its process is checked."""
    who = control.queued(folder) or control.owner(folder)
    if who is None and isinstance(before, Owner) and before.here and before.torchrun and runs(before.torchrun):
        return before
    return who


class Screen:
    """Shows a run from its latest start on, with a new console per start, as in the training process."""

    def __init__(self, folder: RunFolder, stream: TextIO, env: Mapping[str, str] = os.environ) -> None:
        self.folder = folder
        self.ended: str | None = None
        self._stream, self._env = stream, env
        self._console = Console(stream, env)
        self._rows, self._events = Tail(folder.metrics, POSITION), Tail(folder.events)
        starts = [event for event in Tail(folder.events).added() if event.get("event") == "start"]
        self._from = generation_of(starts[-1]) if starts else 0
        self._generation = 0
        self._now = place(last_row(folder.metrics) or {})
        self._said = ""

    def look(self) -> bool:
        """Show the lines added since the last call; return whether there were any.

        Events are read first, so that the rows written before an event are already available.
        """
        events = deque(self._events.added())
        something = bool(events)
        for row in self._rows.added():
            something = True
            if generation_of(row) > self._generation:  # the start event was written before this row
                events.extend(self._events.added())
            while events and (events[0]["time"] <= row["time"] or generation_of(row) > self._generation):
                self._event(events.popleft())
            self._row(row)
        for event in events:
            self._event(event)
        return something

    def waits(self, who: Who) -> None:
        """Print, once per reason, why there is nothing to show yet."""
        queued = isinstance(who, Queued) and who.waits
        said = f"queued {who}" if queued else "" if self._generation else "starting"
        if said and said != self._said:
            self.say(f"{told(self.folder, who)}; waiting for it to start")
        self._said = said

    def say(self, text: str) -> None:
        self.close()
        print(printable(text, self._stream), file=self._stream, flush=True)

    def close(self) -> None:
        self._console.close()

    def _event(self, facts: Mapping[str, Any]) -> None:
        name = facts.get("event")
        if name == "start" and generation_of(facts) >= self._from:
            self._console.close()
            self._console = Console(self._stream, self._env)
            self._generation = generation_of(facts)
            facts = {**facts, "run_dir": str(self.folder.path)}  # the path as seen from this process
        if self._generation < self._from or not isinstance(name, str):
            return
        if name in ENDINGS:
            self.ended = None if name == "start" else name
        self._show(event_of(facts))

    def _row(self, row: Mapping[str, Any]) -> None:
        if generation_of(row) < max(self._from, self._generation):
            return  # a row of an earlier start
        self._console.live = place(row) >= self._now
        self._show(reading_of(row))

    def _show(self, entry: Event | Reading) -> None:
        """Show an entry; one with malformed values is skipped, as in the run itself."""
        with suppress(TypeError, ValueError, KeyError, AttributeError):
            self._console.write(entry)


class Tail:
    """Follows a JSONL file and yields the objects of new lines. A line is read once it ends in a newline.

    A truncated or replaced file is read from its beginning; objects that were yielded before are skipped by `time`.
    """

    def __init__(self, path: Path, numbers: Sequence[str] = ("time",)) -> None:
        """`numbers`: the numeric fields that every object must have."""
        self._path, self._numbers = path, numbers
        self._at = self._inode = 0
        self._last = self._known = -math.inf

    def added(self) -> Iterator[dict[str, Any]]:
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
                found = entry(line, self._numbers)
                if found is not None and found["time"] > self._known:
                    self._last = max(self._last, found["time"])
                    yield found


def entry(line: bytes, numbers: Sequence[str]) -> dict[str, Any] | None:
    """Parse a line; None if it is not an object with these numeric fields."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(found, dict) and all(is_number(found.get(name)) for name in numbers)
    return found if whole else None


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def event_of(facts: Mapping[str, Any]) -> Event:
    """Convert to a console event. The console leaves errors to the driver, so an error is shown as an alarm here."""
    name, rest = facts["event"], {key: value for key, value in facts.items() if key not in ("time", "event")}
    if name == "error":
        return Event(facts["time"], "alarm", {"kind": "error", "detail": failure_text(facts)})
    return Event(facts["time"], name, rest)


def reading_of(row: Mapping[str, Any]) -> Reading:
    """Convert a row back to a MetricsRow; null becomes NaN, which JSON cannot represent."""
    values = {key: math.nan if value is None else value for key, value in row.items() if key not in POSITION}
    figures = {key: value for key, value in values.items() if isinstance(value, int | float)}
    return Reading(**{name: row[name] for name in POSITION}, values=figures)


def generation_of(entry: Mapping[str, Any]) -> int:
    return whole_number(entry, "generation")


def place(row: Mapping[str, Any]) -> tuple[int, int]:
    return generation_of(row), whole_number(row, "update")


def whole_number(entry: Mapping[str, Any], name: str) -> int:
    """Return the field as an integer; 0 if it is missing or not a number."""
    found = entry.get(name)
    return int(found) if found is not None and is_number(found) else 0
