"""A stop that is requested from the driver: passed on to the workers, and limited in time after SIGTERM and SIGHUP."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from launcher.distributed.leftovers import JobMark, end_leftovers
from launcher.run_dir.run_directory import RunDirectory
from launcher.system.jsonl import JsonlReader
from launcher.system.processes import handles_signal, is_running, list_child_pids
from launcher.system.stderr import print_stderr

__all__ = ["AgentWorkers", "JobStop"]

REFRESH_INTERVAL_S = 1.0


class AgentWorkers:
    """The workers of the driver's torchrun agent, as the kernel lists them."""

    def __init__(self, agent: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._agent = agent
        self._clock = clock
        self._refreshed_s = float("-inf")
        self._marks: list[JobMark] = []

    def list_pids(self) -> list[int]:
        """The workers that run now."""
        return [pid for pid in list_child_pids(self._agent) if is_running(pid)]

    def refresh(self) -> None:
        """Note which workers run, about once per second; what they leave behind is found by that."""
        now = self._clock()
        if now - self._refreshed_s < REFRESH_INTERVAL_S:
            return
        self._refreshed_s = now
        marks = [mark for mark in map(JobMark.of_process, self.list_pids()) if mark is not None]
        self._marks = marks or self._marks

    def end_leftovers(self) -> None:
        """End the processes that the workers have started; call it when the workers have ended."""
        end_leftovers(self._marks)

    @property
    def have_started(self) -> bool:
        return bool(self._marks)


class JobStop:
    """What the signals to the driver request: save and stop. SIGTERM and SIGHUP limit the time for it to `grace_s`.

    `signal_name` is that of the first signal, empty before it. `is_aborted`: a second Ctrl-C ends the job at once.
    """

    def __init__(self, run_dir: RunDirectory, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.signal_name = ""
        self.is_aborted = False
        self._run_dir = run_dir
        self._grace_s = grace_s
        self._clock = clock
        self._deadline_s = float("inf")
        self._requested_at = float("inf")
        self._signalled_pids: set[int] = set()
        self._has_trained = False

    def on_signal(self, signum: int, _: FrameType | None) -> None:
        """Handle Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP."""
        if signum in (signal.SIGTERM, signal.SIGHUP):
            self._deadline_s = min(self._deadline_s, self._clock() + self._grace_s)
        if not self.signal_name:
            self.signal_name, self._requested_at = signal.Signals(signum).name, time.time()
            with suppress(OSError):  # e.g. a full disk: the workers receive a signal as well
                self._run_dir.request_stop(self.signal_name)
            more = " (press Ctrl-C again to end at once)" if signum == signal.SIGINT else ""
            print_stderr(f"{self.signal_name}: saving at the next update, then stopping{more}")
        elif signum == signal.SIGINT:
            self.is_aborted = True

    @property
    def is_overdue(self) -> bool:
        """Whether the grace time is over."""
        return self._clock() >= self._deadline_s

    def forward(self, workers: AgentWorkers) -> None:
        """Send SIGUSR1 to each worker that has installed its handler; until then it polls the stop file."""
        for pid in workers.list_pids():
            if pid not in self._signalled_pids and handles_signal(pid, signal.SIGUSR1):
                self._signalled_pids.add(pid)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)

    def has_nothing_to_save(self, workers: AgentWorkers) -> bool:
        """Whether no worker trains: before training, they let SIGTERM end them."""
        pids = workers.list_pids()
        self._has_trained = self._has_trained or any(handles_signal(pid, signal.SIGTERM) for pid in pids)
        return not self._has_trained and (bool(pids) or not workers.have_started)

    def was_saved(self) -> bool:
        """Whether the workers have saved and left since the stop was requested, by a signal or by `launcher stop`."""
        events = JsonlReader(self._run_dir.events, containing="preempt")
        since = min(self._requested_at, self._read_request_time())
        return any(event.get("event") == "preempt" and event["time"] >= since for event in events)

    def _read_request_time(self) -> float:
        try:
            return self._run_dir.stop_file.stat().st_mtime
        except OSError:
            return float("inf")
