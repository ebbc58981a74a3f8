"""Asynchronous logging: training hands rows and events to the sinks and continues immediately.

Each sink has its own queue and thread, so a slow sink does not delay training or the other sinks. Rows wait until the
thread next wakes, a few times a second, because each wake-up takes the GIL from training; events wake it immediately.
A failing sink is reported once, retried, and never interrupts training.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from launcher.telemetry.records import Event, MetricsRow

__all__ = ["MetricsLogger", "Sink", "print_over_progress_bar"]

WRITE_INTERVAL_S = 0.25
MAX_RETRY_INTERVAL_S = 30.0
MAX_WRITE_TRIES = 3
QUEUE_ROWS = 20_000
SINK_TIMEOUT_S = 2.0


class Sink(Protocol):
    """A destination for rows and events. Both methods are called from the sink's own thread.

    Optional attributes: `lossless = True` gives an unbounded queue whose events are written before `event()` returns;
    `every_s` is the interval at which rows are delivered; `patience_s` limits how long closing may take; `abandon()`
    is called if closing takes longer.
    """

    def write(self, entry: MetricsRow | Event) -> None: ...

    def close(self) -> None: ...


def print_over_progress_bar(text: str) -> None:
    """Print one line to stderr, first clearing a progress bar that may be on the line."""
    start = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{start}{text}", file=sys.stderr, flush=True)


class MetricsLogger:
    """Distributes rows and events to the sinks, on rank 0.

    Logging a row costs about a microsecond per sink. Logging an event returns once the event is in `events.jsonl`, or
    after 2 s.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        clock: Callable[[], float] = time.time,
        say: Callable[[str], None] = print_over_progress_bar,
        queue_rows: int = QUEUE_ROWS,
    ) -> None:
        self._clock = clock
        self._say = say
        self._lanes = tuple(SinkThread(sink, self._report_failure, queue_rows) for sink in sinks)
        for lane in self._lanes:
            lane.start()

    def log_metrics(self, row: MetricsRow) -> None:
        for lane in self._lanes:
            lane.put(row)

    def log_event(self, name: str, /, **facts: Any) -> None:
        self._broadcast_event(Event(self._clock(), name, facts))
        self.flush()

    def flush(self, timeout_s: float = SINK_TIMEOUT_S) -> None:
        """Wait until the JSONL files hold all entries so far: rows that a checkpoint covers must not be lost."""
        for lane in self._lanes:
            if lane.lossless:
                lane.flush(timeout_s)

    def close(self) -> None:
        """Write what remains. A sink that takes longer than its `patience_s` (2 s) is abandoned, with a warning."""
        start = time.monotonic()
        hasty = [lane for lane in self._lanes if not lane.lossless]
        for lane in hasty:
            lane.finish()
        for lane in hasty:
            lane.join(start)
        for lane in self._lanes:
            if lane.lost:
                self._report_failure(lane.name, f"{lane.lost} rows were not written; metrics.jsonl has them")
        for lane in self._lanes:
            if lane.lossless:
                lane.finish()
                lane.join(time.monotonic())

    def _broadcast_event(self, event: Event, kept_only: bool = False) -> None:
        for lane in self._lanes:
            if lane.lossless or not kept_only:
                lane.put(event)
                lane.wake()

    def _report_failure(self, name: str, why: str) -> None:
        """Report a sink's failure. Also called from the sinks' threads, so it must not block."""
        detail = f"{name}: {why}"
        self._say(f"warning: {detail}")
        self._broadcast_event(Event(self._clock(), "alarm", {"kind": "sink", "detail": detail}), kept_only=True)


class SinkThread:
    """One sink with its queue and thread."""

    def __init__(self, sink: Sink, report: Callable[[str, str], None], queue_rows: int) -> None:
        self.name = type(sink).__name__.lower()
        self.lossless: bool = getattr(sink, "lossless", False)
        self.lost = 0
        self._every_s: float = getattr(sink, "every_s", WRITE_INTERVAL_S)
        self._sink = sink
        self._report = report
        self._room = queue_rows
        self._queue: deque[MetricsRow | Event] = deque()
        self._waiting: deque[threading.Event] = deque()
        self._awake = threading.Event()
        self._closing = self._abandoned = False
        self._failures = 0  # consecutive failures of the sink; `_tries` counts attempts at the current entry
        self._tries = 0
        self._reported = False
        self._thread = threading.Thread(target=self._run, name=f"sink-{self.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, entry: MetricsRow | Event) -> None:
        if len(self._queue) >= self._room and not self.lossless and isinstance(entry, MetricsRow):
            self.lost += 1
        else:
            self._queue.append(entry)

    def wake(self) -> None:
        self._awake.set()

    def flush(self, timeout_s: float) -> None:
        """Wait until every entry put so far has been written, or the next attempt has failed."""
        if not self._thread.is_alive():
            return
        written = threading.Event()
        self._waiting.append(written)
        self.wake()
        written.wait(timeout_s)

    def finish(self) -> None:
        self._closing = True
        self.wake()

    def join(self, start: float) -> None:
        """Wait for the thread, at most `patience_s` from `start`; the sink may raise `patience_s` meanwhile."""
        while self._thread.is_alive() and time.monotonic() < start + getattr(self._sink, "patience_s", SINK_TIMEOUT_S):
            self._thread.join(0.02)
        if self._thread.is_alive():
            self._abandoned = True
            abandon = getattr(self._sink, "abandon", None)
            abandon() if abandon else self._report(self.name, "did not close in time and was abandoned")

    def _run(self) -> None:
        while not self._closing:
            self._awake.wait(min(self._every_s * 2**self._failures, MAX_RETRY_INTERVAL_S))
            self._awake.clear()
            self._write_queued()
        self._write_queued()
        self.lost += sum(isinstance(entry, MetricsRow) for entry in self._queue)
        try:
            self._sink.close()
        except (Exception, SystemExit) as error:
            self._record_failure(error)

    def _write_queued(self) -> None:
        """Write the queued entries up to the first failure, then release the callers waiting in `flush`."""
        waiting = len(self._waiting)
        while self._queue and self._try_write(self._queue[0]):
            self._queue.popleft()
        for _ in range(waiting):
            self._waiting.popleft().set()

    def _try_write(self, entry: MetricsRow | Event) -> bool:
        """Write one entry; return whether it is finished with: written, or given up after several tries."""
        try:
            self._sink.write(entry)
        except (Exception, SystemExit) as error:  # some libraries call sys.exit, which would end the thread silently
            self._record_failure(error)
            self._tries += 1
            if self._tries < MAX_WRITE_TRIES or (self.lossless and isinstance(error, OSError)):
                return False
            self.lost += isinstance(entry, MetricsRow)
        else:
            self._failures = 0
        self._tries = 0
        return True

    def _record_failure(self, error: BaseException) -> None:
        self._failures = min(self._failures + 1, 10)
        if not self._reported and not self._abandoned:
            self._reported = True
            self._report(self.name, f"{type(error).__name__}: {' '.join(str(error).split())} (training continues)")
