"""The console sink: a summary at the start, progress (a bar on a terminal, else plain lines), a summary at the end.

Drawing is hand-written rather than done by a library: a redraw takes about 30 microseconds, which matters because it
competes with training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from launcher.reading import Event, Reading
from launcher.sinks.closing import closing_lines, speed_text
from launcher.sinks.progress import Progress
from launcher.sinks.summary import plan_rows, replan_text, resize_text, start_rows, title
from launcher.sinks.tally import Tally
from launcher.sinks.text import Paint, count, draws, figure, fold, knows, one_line, plain, rows, size, took

__all__ = ["Console"]

REDRAW_S = 0.24
PLAIN_S = 5.0
SLOW_SAVE_S = 2.0
COLUMNS = 80
BOLD, RED, GREEN, YELLOW, CYAN = 1, 31, 32, 33, 36


class Console:
    """Prints at most 80 columns, fewer on a narrower terminal; uses colours only on a terminal without NO_COLOR.

    `live` is False while past rows are replayed: then only validations print a line and no bar is drawn.
    """

    live = True

    def __init__(self, stream: TextIO | None = None, env: Mapping[str, str] = os.environ) -> None:
        self._stream = stream or sys.stdout
        self._terminal = draws(self._stream, env)
        self._paint = Paint.of(self._stream, env)
        self._unicode = knows(self._stream, "·━╸─█")
        self._tally = Tally()
        self._facts: Mapping[str, Any] = {}
        self._progress = Progress(self._tally, 0, 0)
        self._drawn_s = float("-inf")
        self._bar = self._gap = False
        self._events: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
            "start": self._start,
            "plan": self._plan,
            "resume": self._resume,
            "resize": lambda facts: self._note("resize", resize_text(facts)),
            "checkpoint": self._checkpoint,
            "target": self._target,
            "preempt": self._preempt,
            "done": self._done,
            "error": lambda facts: self._clear(),  # the process that started the job prints the error, once
        }

    def write(self, entry: Reading | Event) -> None:
        if isinstance(entry, Reading):
            self._reading(entry)
        elif entry.event in ("alarm", "oom"):
            what = entry.facts.get("detail") or "out of memory"
            self._note("warning:", one_line(what), YELLOW)
        elif entry.event in self._events:
            self._events[entry.event](entry.facts)

    def close(self) -> None:
        self._clear()
        self._stream.flush()

    def _reading(self, reading: Reading) -> None:
        self._tally.add(reading)
        validated = any(key.startswith("val/") for key in reading.values)
        due = self.live and reading.time - self._drawn_s >= (REDRAW_S if self._terminal else PLAIN_S)
        if validated or (due and not self._terminal):
            self._line(self._progress.line(reading, self._width))
        if due or validated:
            self._drawn_s = reading.time
            self._draw()

    def _start(self, facts: Mapping[str, Any]) -> None:
        self._facts = facts
        self._progress = Progress(
            self._tally, facts.get("duration_samples") or 0, (facts.get("data") or {}).get("train")
        )
        self._print("", self._paint(one_line(title(facts))[: self._width], BOLD))
        self._print(*rows(start_rows(facts), self._width, self._paint))
        self._gap = True

    def _plan(self, facts: Mapping[str, Any]) -> None:
        if facts.get("from") is not None:
            return self._note("plan", replan_text(facts))
        train = (self._facts.get("data") or {}).get("train")
        self._print(*rows(plan_rows(facts, train), self._width, self._paint))
        self._gap = True
        return None

    def _resume(self, facts: Mapping[str, Any]) -> None:
        passed = facts.get("passed_over") or ()
        for one in passed:
            self._note("warning:", f"checkpoint {one.get('name')} was skipped: {one.get('why')}", YELLOW)
        where = f"{facts.get('checkpoint')} at update {count(facts.get('update', 0))}"
        changed = [f"{key} {old} -> {new}" for key, (old, new) in (facts.get("changed") or {}).items()]
        lost = facts.get("lost_samples")
        again = [f"{count(lost)} samples are run again"] if lost else []
        self._print(*rows([("resumed", " · ".join([where, *again, *changed]))], self._width, self._paint))
        self._gap = True

    def _checkpoint(self, facts: Mapping[str, Any]) -> None:
        if facts.get("seconds", 0.0) >= SLOW_SAVE_S:
            self._note(
                "checkpoint", f"{facts.get('name')} took {took(facts['seconds'])} ({size(facts.get('bytes', 0))})"
            )

    def _target(self, facts: Mapping[str, Any]) -> None:
        metric = str(facts.get("metric", "")).replace("/", " ")
        when = f"{took(facts.get('seconds', 0.0))}, {count(facts.get('samples', 0))} samples"
        self._note("target", f"{metric} {figure(facts.get('value', 0.0))} reached after {when}", GREEN)

    def _preempt(self, facts: Mapping[str, Any]) -> None:
        where = f"at update {count(facts.get('update', 0))}, {count(facts.get('samples', 0))} samples"
        self._gap = True
        self._note("stopped", f"{where} · {facts.get('why', '')} · saved, nothing is lost", YELLOW)
        self._closing({})

    def _done(self, facts: Mapping[str, Any]) -> None:
        speed = self._tally.mean_samples_per_s
        text = speed_text(facts.get("samples", 0), facts.get("updates", 0), facts.get("seconds", 0.0), speed)
        self._gap = True
        self._note("finished", text, GREEN)
        self._closing(facts)

    def _closing(self, done: Mapping[str, Any]) -> None:
        self._print(*closing_lines(self._tally, self._facts, done, self._paint, self._width), "")

    def _note(self, label: str, text: str, colour: int = CYAN) -> None:
        """Print an event on lines of its own."""
        first, *others = fold(one_line(f"{label} {text}"), self._width, 2)
        self._line(self._paint(label, BOLD, colour) + first[len(label) :], *others)

    def _line(self, *lines: str) -> None:
        """Print lines, separated by a blank line from a preceding block of rows."""
        self._print(*([""] if self._gap else []), *lines)
        self._gap = False

    def _print(self, *lines: str) -> None:
        self._clear()
        self._put("".join(f"{line}\n" for line in lines))

    def _draw(self) -> None:
        """Draw the bar and leave the cursor at its start, so that the next bar overwrites it."""
        if self._terminal and self.live:
            self._put(f"\r{self._progress.bar(self._width - 1, self._paint)}\x1b[K\r")
            self._bar = True

    def _clear(self) -> None:
        if self._bar:
            self._put("\r\x1b[K")
            self._bar = False

    def _put(self, text: str) -> None:
        self._stream.write(text if self._unicode else plain(text, self._stream))
        self._stream.flush()

    @property
    def _width(self) -> int:
        if not self._terminal:
            return COLUMNS
        try:
            return min(COLUMNS, os.get_terminal_size(self._stream.fileno()).columns or COLUMNS)
        except OSError:
            return COLUMNS
