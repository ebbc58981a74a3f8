"""The console sink: a summary at the start, progress (a bar on a terminal, else plain lines), a summary at the end.

Everything is formatted as plain text here and not by a library: this takes microseconds, which matters because it
competes with training for the GIL. The cursor is never hidden, so a killed job leaves the terminal usable.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from launcher.system.formatting import (
    Style,
    can_encode,
    format_bytes,
    format_count,
    format_duration,
    format_labelled_rows,
    format_number,
    strip_control_characters,
    supports_redraw,
    to_ascii,
    wrap_text,
)
from launcher.telemetry.records import Event, MetricsRow
from launcher.telemetry.sinks.final_summary import format_closing_lines, format_speed, make_unapplied_rows
from launcher.telemetry.sinks.progress_bar import ProgressFormatter
from launcher.telemetry.sinks.running_stats import RunningStats
from launcher.telemetry.sinks.start_summary import (
    format_replan,
    format_resize,
    format_title,
    make_plan_rows,
    make_start_rows,
)

__all__ = ["ConsoleSink"]

REDRAW_INTERVAL_S = 0.24
PLAIN_LINE_INTERVAL_S = 5.0
SLOW_SAVE_S = 2.0
MAX_COLUMNS = 80
BOLD, RED, GREEN, YELLOW, CYAN = 1, 31, 32, 33, 36


class ConsoleSink:
    """Prints at most 80 columns, fewer on a narrower terminal; uses colours only on a terminal without NO_COLOR.

    `live` is False while past rows are replayed: then only validations print a line and no bar is drawn.
    """

    live = True

    def __init__(self, stream: TextIO | None = None, env: Mapping[str, str] = os.environ) -> None:
        self._stream = stream or sys.stdout
        self._is_terminal = supports_redraw(self._stream, env)
        self._style = Style.from_stream(self._stream, env)
        self._supports_unicode = can_encode(self._stream, "·━╸─█")
        self._stats = RunningStats()
        self._facts: Mapping[str, Any] = {}
        self._progress = ProgressFormatter(self._stats, 0, 0)
        self._drawn_s = float("-inf")
        self._bar_is_drawn = self._needs_blank_line = False
        self._events: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
            "start": self._print_start,
            "plan": self._print_plan,
            "resume": self._print_resume,
            "resize": lambda facts: self._print_note("resize", format_resize(facts)),
            "checkpoint": self._print_slow_checkpoint,
            "target": self._print_target,
            "preempt": self._print_preempt,
            "done": self._print_done,
            "error": lambda facts: self._clear_bar(),  # the process that started the job prints the error, once
        }

    def write(self, entry: MetricsRow | Event) -> None:
        if isinstance(entry, MetricsRow):
            self._show_metrics(entry)
        elif entry.event in ("alarm", "oom"):
            detail = entry.fields.get("detail") or "out of memory"
            self._print_note("warning:", strip_control_characters(detail), YELLOW)
        elif entry.event in self._events:
            self._events[entry.event](entry.fields)

    def close(self) -> None:
        self._clear_bar()
        self._stream.flush()

    def _show_metrics(self, row: MetricsRow) -> None:
        self._stats.add(row)
        validated = any(key.startswith("val/") for key in row.values)
        interval_s = REDRAW_INTERVAL_S if self._is_terminal else PLAIN_LINE_INTERVAL_S
        is_due = self.live and row.time - self._drawn_s >= interval_s
        if validated or (is_due and not self._is_terminal):
            self._print_after_block(self._progress.format_line(row, self._width))
        if is_due or validated:
            self._drawn_s = row.time
            self._draw_bar()

    def _print_start(self, facts: Mapping[str, Any]) -> None:
        self._facts = facts
        self._progress = ProgressFormatter(
            self._stats, facts.get("duration_samples") or 0, (facts.get("data") or {}).get("train")
        )
        self._print_lines("", self._style(strip_control_characters(format_title(facts))[: self._width], BOLD))
        self._print_rows(make_start_rows(facts))

    def _print_plan(self, facts: Mapping[str, Any]) -> None:
        if facts.get("from") is not None:
            return self._print_note("plan", format_replan(facts))
        train = (self._facts.get("data") or {}).get("train")
        return self._print_rows(make_plan_rows(facts, train))

    def _print_resume(self, facts: Mapping[str, Any]) -> None:
        for skipped in facts.get("passed_over") or ():
            self._print_note("warning:", f"checkpoint {skipped.get('name')} was skipped: {skipped.get('why')}", YELLOW)
        position = f"{facts.get('checkpoint')} at update {format_count(facts.get('update', 0))}"
        lost_samples = facts.get("lost_samples")
        repeated = [f"{format_count(lost_samples)} samples are run again"] if lost_samples else []
        changed = [f"{key} {old} -> {new}" for key, (old, new) in (facts.get("changed") or {}).items()]
        self._print_rows([("resumed", " · ".join([position, *repeated, *changed]))])

    def _print_slow_checkpoint(self, facts: Mapping[str, Any]) -> None:
        if facts.get("seconds", 0.0) >= SLOW_SAVE_S:
            self._print_note(
                "checkpoint",
                f"{facts.get('name')} took {format_duration(facts['seconds'])} ({format_bytes(facts.get('bytes', 0))})",
            )

    def _print_target(self, facts: Mapping[str, Any]) -> None:
        metric = str(facts.get("metric", "")).replace("/", " ")
        when = f"{format_duration(facts.get('seconds', 0.0))}, {format_count(facts.get('samples', 0))} samples"
        self._print_note("target", f"{metric} {format_number(facts.get('value', 0.0))} reached after {when}", GREEN)

    def _print_preempt(self, facts: Mapping[str, Any]) -> None:
        position = f"at update {format_count(facts.get('update', 0))}, {format_count(facts.get('samples', 0))} samples"
        self._needs_blank_line = True
        self._print_note("stopped", f"{position} · {facts.get('why', '')} · saved, nothing is lost", YELLOW)
        for _, text in make_unapplied_rows(facts):
            self._print_note("skipped", text, YELLOW)
        self._print_closing({})

    def _print_done(self, facts: Mapping[str, Any]) -> None:
        speed = self._stats.mean_samples_per_s
        text = format_speed(facts.get("samples", 0), facts.get("updates", 0), facts.get("seconds", 0.0), speed)
        self._needs_blank_line = True
        self._print_note("finished", text, GREEN)
        self._print_closing(facts)

    def _print_closing(self, done: Mapping[str, Any]) -> None:
        self._print_lines(*format_closing_lines(self._stats, self._facts, done, self._style, self._width), "")

    def _print_note(self, label: str, text: str, colour: int = CYAN) -> None:
        """Print an event on lines of its own."""
        first, *others = wrap_text(strip_control_characters(f"{label} {text}"), self._width, 2)
        self._print_after_block(self._style(label, BOLD, colour) + first[len(label) :], *others)

    def _print_rows(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print a block of labelled rows; a blank line follows before anything but another block."""
        self._print_lines(*format_labelled_rows(rows, self._width, self._style))
        self._needs_blank_line = True

    def _print_after_block(self, *lines: str) -> None:
        """Print lines, separated by a blank line from a preceding block of rows."""
        self._print_lines(*([""] if self._needs_blank_line else []), *lines)
        self._needs_blank_line = False

    def _print_lines(self, *lines: str) -> None:
        self._clear_bar()
        self._write_text("".join(f"{line}\n" for line in lines))

    def _draw_bar(self) -> None:
        """Draw the bar and leave the cursor at its start, so that the next bar overwrites it."""
        if self._is_terminal and self.live:
            self._write_text(f"\r{self._progress.format_bar(self._width - 1, self._style)}\x1b[K\r")
            self._bar_is_drawn = True

    def _clear_bar(self) -> None:
        if self._bar_is_drawn:
            self._write_text("\r\x1b[K")
            self._bar_is_drawn = False

    def _write_text(self, text: str) -> None:
        self._stream.write(text if self._supports_unicode else to_ascii(text, self._stream))
        self._stream.flush()

    @property
    def _width(self) -> int:
        if not self._is_terminal:
            return MAX_COLUMNS
        try:
            return min(MAX_COLUMNS, os.get_terminal_size(self._stream.fileno()).columns or MAX_COLUMNS)
        except OSError:
            return MAX_COLUMNS
