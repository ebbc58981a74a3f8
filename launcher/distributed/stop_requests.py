"""Requests to a worker from outside: save and stop, save and restart, or save and admit a node.

A signal only sets a flag; the ranks agree on it by the next update's statistics. Rank 0 also polls the run directory
for the `stop` file and for nodes that wait to join.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from types import FrameType
from typing import Protocol

from launcher.distributed.cleanup_process import CleanupProcess
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_RESTART
from launcher.system.signal_handlers import list_not_ignored
from launcher.system.stderr import print_stderr

__all__ = ["StopLevel", "StopRequests", "StopSource"]

STOP_POLL_S = 0.2
MIN_AGREEMENT_S = 5.0  # time for the ranks to agree on a stop, if their updates are short
AGREEMENT_UPDATES = 4  # where statistics are read late, it takes two whole updates and a part of two
AGREEMENT_POLL_S = 0.1
EXIT_S = 0.5  # before the end of the grace time: time to end this process


class StopLevel(IntEnum):
    """How far training is asked to stop; the ranks agree on the largest level that any of them requests.

    ADMIT_NODES saves, waits for nodes to join, and continues. RESTART saves and exits, and the agent then restarts the
    workers.
    """

    CONTINUE = 0
    ADMIT_NODES = 1
    STOP = 2
    RESTART = 3


class StopSource(Protocol):
    """A source of stop and join requests: the run directory."""

    def stop_requested(self) -> bool: ...
    def join_requested(self) -> bool: ...


class StopRequests:
    """The requests received so far. Call `install` before anything slow: a signal's default action ends the process.

    SIGTERM and SIGHUP keep their default action until `handle_sigterm`: before training there is nothing to save, and a
    rank that waits for the others inside torch would react late, while its agent waits 30 s for it. From then on they
    mean: save, then exit, within `launch.grace_s`. A rank that reaches no agreement with the others within four
    updates (at least 5 s) exits without saving: the other ranks are gone or stuck. Time in which a rank of this node
    is `busy`, because it validates or saves, is not counted.
    """

    def __init__(self, cleanup: CleanupProcess | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._cleanup = cleanup
        self.reason: str | None = None
        self._level = StopLevel.CONTINUE
        self._clock = clock
        self._last_poll_s = float("-inf")
        self._update_began_s: float | None = None
        self._update_s: float | None = None
        self._grace_s = 0.0
        self._is_busy: Callable[[], bool] = lambda: False
        self._acknowledged = threading.Event()

    def install(self) -> None:
        signal.signal(signal.SIGUSR1, self._on_sigusr1)
        signal.signal(signal.SIGINT, self._on_sigint)

    def handle_sigterm(self, grace_s: float, is_busy: Callable[[], bool] = lambda: False) -> None:
        """Call when training begins: from now on SIGTERM and SIGHUP mean save first, then exit, within `grace_s`.

        `is_busy` tells whether a rank of this node does what takes longer than an update: it validates or saves.
        """
        self._grace_s, self._is_busy = grace_s, is_busy
        if self._cleanup is not None:
            self._cleanup.limit_time_after_sigterm(grace_s)
        for signum in (signal.SIGTERM, *list_not_ignored(signal.SIGHUP)):
            signal.signal(signum, self._on_sigterm)

    def acknowledge(self) -> None:
        """Record that the ranks have agreed to stop or restart: saving may now take as long as it needs."""
        self._acknowledged.set()

    def ignore_late_signals(self) -> None:
        """Ignore SIGUSR1 from now on: a late one must not end the interpreter during its cleanup."""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def poll(self, source: StopSource | None) -> StopLevel:
        """Return the current level; called once per update.

        `source` is passed on rank 0 only and is polled a few times per second.
        """
        now = self._clock()
        if self._update_began_s is not None:
            self._update_s = now - self._update_began_s
        self._update_began_s = now
        if source is not None and self._level == StopLevel.CONTINUE and now - self._last_poll_s >= STOP_POLL_S:
            self._last_poll_s = now
            if source.stop_requested():
                self._raise_level(StopLevel.STOP, "the stop file")
            elif source.join_requested():
                self._level = StopLevel.ADMIT_NODES
        return self._level

    @property
    def level(self) -> StopLevel:
        """The current level, without polling the run directory."""
        return self._level

    def clear_admit(self) -> None:
        """Clear a request to admit nodes after the time to join has passed."""
        self._acknowledged.clear()
        if self._level == StopLevel.ADMIT_NODES:
            self._level = StopLevel.CONTINUE

    def _raise_level(self, level: StopLevel, reason: str) -> None:
        self._level = max(self._level, level)
        self.reason = self.reason or reason

    def _on_sigusr1(self, _: int, __: FrameType | None) -> None:
        self._raise_level(StopLevel.STOP, "SIGUSR1")

    def _on_sigterm(self, signum: int, _: FrameType | None) -> None:
        if self._level < StopLevel.RESTART:
            self._raise_level(StopLevel.RESTART, signal.Signals(signum).name)
            threading.Thread(target=self._exit_in_time, name="exit-in-time", daemon=True).start()

    def _exit_in_time(self) -> None:
        """Exit without an agreement between the ranks after some updates, in any case before the grace time is over."""
        ends_s = time.monotonic() + max(self._grace_s - EXIT_S, self._grace_s / 2)
        agreed = self._wait_for_agreement(ends_s)
        if not agreed and time.monotonic() < ends_s:
            os._exit(EXIT_RESTART)
        time.sleep(max(0.0, ends_s - time.monotonic()))
        print_stderr(
            f"error: {self.reason}: this worker was not done within launch.grace_s={self._grace_s:g} and has left; "
            "the run continues from its newest checkpoint"
        )
        os._exit(EXIT_FAILED if agreed else EXIT_RESTART)

    def _wait_for_agreement(self, ends_s: float) -> bool:
        """Wait until the ranks agree, for the time of a few updates, which busy ranks extend to the end."""
        left_s = max(MIN_AGREEMENT_S, AGREEMENT_UPDATES * (self._update_s or self._grace_s))
        while (wait_s := min(AGREEMENT_POLL_S, left_s, ends_s - time.monotonic())) > 0:
            if self._acknowledged.wait(wait_s):
                return True
            left_s -= 0.0 if self._is_busy() else wait_s
        return self._acknowledged.is_set()

    def _on_sigint(self, _: int, __: FrameType | None) -> None:
        if self._level != StopLevel.CONTINUE and self.reason == "Ctrl-C":
            os._exit(EXIT_INTERRUPTED)
        self._raise_level(StopLevel.STOP, "Ctrl-C")
