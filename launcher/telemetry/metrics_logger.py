"""Asynchronous logging: training hands rows and events to the sinks and continues immediately.

Each sink has its own queue and thread, so a slow sink does not delay training or the other sinks. Rows wait until the
thread next wakes, a few times a second, because each wake-up takes the GIL from training; events wake it immediately.
A failing sink is reported once, retried, and never interrupts training.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from launcher.system.run_files import METRICS_FILE
from launcher.system.stderr import print_over_progress_bar
from launcher.telemetry.records import Event, MetricsRow
from launcher.telemetry.sink import SINK_TIMEOUT_S, Sink

__all__ = ["MetricsLogger"]

WRITE_INTERVAL_S = 0.25
MAX_RETRY_INTERVAL_S = 30.0
MAX_WRITE_TRIES = 3
QUEUE_ROWS = 20_000


class MetricsLogger:
    """Distributes rows and events to the sinks, on rank 0.

    Logging a row costs about a microsecond per sink. Logging an event returns once the event is in `events.jsonl`, or
    after 2 s.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        clock: Callable[[], float] = time.time,
        report: Callable[[str], None] = print_over_progress_bar,
        queue_rows: int = QUEUE_ROWS,
    ) -> None:
        self._clock = clock
        self._report = report
        self._threads = tuple(SinkThread(sink, self._report_failure, queue_rows) for sink in sinks)
        for thread in self._threads:
            thread.start()

    def log_metrics(self, row: MetricsRow) -> None:
        for thread in self._threads:
            thread.put(row)

    def log_event(self, name: str, /, **facts: Any) -> None:
        self._broadcast_event(Event(self._clock(), name, facts))
        self.flush()

    def flush(self, timeout_s: float = SINK_TIMEOUT_S) -> None:
        """Wait until the JSONL files hold all entries so far: rows that a checkpoint covers must not be lost."""
        for thread in self._threads:
            if thread.lossless:
                thread.flush(timeout_s)

    def close(self) -> None:
        """Write what remains. A sink that takes longer than its `close_timeout_s` is abandoned, with a warning."""
        start = time.monotonic()
        lossy = [thread for thread in self._threads if not thread.lossless]
        for thread in lossy:
            thread.finish()
        for thread in lossy:
            thread.join(start)
        for thread in self._threads:
            if thread.lost_rows:
                self._report_failure(thread.name, f"{thread.lost_rows} rows were not written; {METRICS_FILE} has them")
        for thread in self._threads:
            if thread.lossless:
                thread.finish()
                thread.join(time.monotonic())

    def _broadcast_event(self, event: Event, lossless_only: bool = False) -> None:
        for thread in self._threads:
            if thread.lossless or not lossless_only:
                thread.put(event)
                thread.wake()

    def _report_failure(self, name: str, reason: str) -> None:
        """Report a sink's failure. Also called from the sinks' threads, so it must not block."""
        detail = f"{name}: {reason}"
        self._report(f"warning: {detail}")
        self._broadcast_event(Event(self._clock(), "alarm", {"kind": "sink", "detail": detail}), lossless_only=True)


class SinkThread:
    """One sink with its queue and thread."""

    def __init__(self, sink: Sink, report: Callable[[str, str], None], queue_rows: int) -> None:
        self.name = type(sink).__name__.lower().removesuffix("sink")
        self.lossless: bool = getattr(sink, "lossless", False)
        self.lost_rows = 0
        self._interval_s: float = getattr(sink, "write_interval_s", WRITE_INTERVAL_S)
        self._sink = sink
        self._report = report
        self._queue_rows = queue_rows
        self._queue: deque[MetricsRow | Event] = deque()
        self._flush_events: deque[threading.Event] = deque()
        self._wake_event = threading.Event()
        self._closing = self._abandoned = False
        self._failures = 0  # consecutive failures of the sink; `_tries` counts attempts at the current entry
        self._tries = 0
        self._failure_reported = False
        self._thread = threading.Thread(target=self._run, name=f"sink-{self.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, entry: MetricsRow | Event) -> None:
        if len(self._queue) >= self._queue_rows and not self.lossless and isinstance(entry, MetricsRow):
            self.lost_rows += 1
        else:
            self._queue.append(entry)

    def wake(self) -> None:
        self._wake_event.set()

    def flush(self, timeout_s: float) -> None:
        """Wait until every entry put so far has been written, or the next attempt has failed."""
        if not self._thread.is_alive():
            return
        written = threading.Event()
        self._flush_events.append(written)
        self.wake()
        written.wait(timeout_s)

    def finish(self) -> None:
        self._closing = True
        self.wake()

    def join(self, start: float) -> None:
        """Wait for the thread, at most `close_timeout_s` from `start`; the sink may raise that limit meanwhile."""
        while self._thread.is_alive() and time.monotonic() < start + self._close_timeout_s:
            self._thread.join(0.02)
        if self._thread.is_alive():
            self._abandoned = True
            abandon = getattr(self._sink, "abandon", None)
            abandon() if abandon else self._report(self.name, "did not close in time and was abandoned")

    @property
    def _close_timeout_s(self) -> float:
        return getattr(self._sink, "close_timeout_s", SINK_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closing:
            self._wake_event.wait(min(self._interval_s * 2**self._failures, MAX_RETRY_INTERVAL_S))
            self._wake_event.clear()
            self._write_queued()
        self._write_queued()
        self.lost_rows += sum(isinstance(entry, MetricsRow) for entry in self._queue)
        try:
            self._sink.close()
        except (Exception, SystemExit) as error:
            self._record_failure(error)

    def _write_queued(self) -> None:
        """Write the queued entries up to the first failure, then release the callers waiting in `flush`."""
        num_waiting = len(self._flush_events)
        while self._queue and self._try_write(self._queue[0]):
            self._queue.popleft()
        for _ in range(num_waiting):
            self._flush_events.popleft().set()

    def _try_write(self, entry: MetricsRow | Event) -> bool:
        """Write one entry; return whether it is finished with: written, or given up after several tries."""
        try:
            self._sink.write(entry)
        except (Exception, SystemExit) as error:  # some libraries call sys.exit, which would end the thread silently
            self._record_failure(error)
            self._tries += 1
            if self._tries < MAX_WRITE_TRIES or (self.lossless and isinstance(error, OSError)):
                return False
            self.lost_rows += isinstance(entry, MetricsRow)
        else:
            self._failures = 0
        self._tries = 0
        return True

    def _record_failure(self, error: BaseException) -> None:
        self._failures = min(self._failures + 1, 10)
        if not self._failure_reported and not self._abandoned:
            self._failure_reported = True
            self._report(self.name, f"{type(error).__name__}: {' '.join(str(error).split())} (training continues)")
