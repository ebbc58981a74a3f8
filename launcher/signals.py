"""Requests to a worker from outside: save and stop, save and restart, or save and admit a node.

A signal only sets a flag; the ranks agree on it in the next all-gather of their statistics. Rank 0 also polls the run
directory for the `stop` file and for nodes that wait to join.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

from launcher.errors import EXIT_AGAIN, EXIT_INTERRUPTED

__all__ = ["GO_ON", "JOIN", "LEAVE", "STOP", "Folder", "Wishes", "handled"]

GO_ON, JOIN, STOP, LEAVE = 0, 1, 2, 3  # LEAVE: save, exit, and let the agent restart; the largest value wins

LOOK_EVERY_S = 0.2
LEAVE_S = 5.0


class Folder(Protocol):
    """A source of stop and join requests: the run directory."""

    def asks_to_stop(self) -> bool: ...
    def asks_to_join(self) -> bool: ...


class Wishes:
    """The requests received so far. Call `install` before anything slow: a signal's default action ends the process.

    SIGTERM keeps its default action until `handle_sigterm`: before training there is nothing to save, and a rank that
    waits for the others inside torch would react late, while its agent waits 30 s for it. A rank that receives SIGTERM
    and reaches no agreement with the others within `leave_s` exits without saving: the other ranks are gone or stuck.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, leave_s: float = LEAVE_S) -> None:
        self.why: str | None = None
        self._wish = GO_ON
        self._clock = clock
        self._looked = float("-inf")
        self._leave_s = leave_s
        self._heard = threading.Event()

    def install(self) -> None:
        signal.signal(signal.SIGUSR1, self._asked_to_stop)
        signal.signal(signal.SIGINT, self._interrupted)

    def guard(self) -> None:
        """Call when training begins: from now on SIGTERM means save first, then exit."""
        signal.signal(signal.SIGTERM, self._asked_to_leave)

    def heard(self) -> None:
        """Record that the ranks have agreed to stop or restart: saving may now take as long as it needs."""
        self._heard.set()

    def done(self) -> None:
        """Ignore SIGUSR1 from now on: a late one must not end the interpreter during its cleanup."""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def read(self, folder: Folder | None) -> int:
        """Return the current request level. `folder` is passed on rank 0 only and is polled a few times per second."""
        now = self._clock()
        if folder is not None and self._wish == GO_ON and now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            if folder.asks_to_stop():
                self._raise(STOP, "the stop file")
            elif folder.asks_to_join():
                self._wish = JOIN
        return self._wish

    @property
    def present(self) -> int:
        """The current request level, without polling the run directory."""
        return self._wish

    def granted(self) -> None:
        """Clear a request to admit nodes after the time to join has passed."""
        self._heard.clear()
        if self._wish == JOIN:
            self._wish = GO_ON

    def _raise(self, wish: int, why: str) -> None:
        self._wish = max(self._wish, wish)
        self.why = self.why or why

    def _asked_to_stop(self, _: int, __: FrameType | None) -> None:
        self._raise(STOP, "SIGUSR1")

    def _asked_to_leave(self, _: int, __: FrameType | None) -> None:
        self._raise(LEAVE, "SIGTERM")
        threading.Thread(target=self._leave_unheard, name="leave", daemon=True).start()

    def _leave_unheard(self) -> None:
        if not self._heard.wait(self._leave_s):
            os._exit(EXIT_AGAIN)

    def _interrupted(self, _: int, __: FrameType | None) -> None:
        if self._wish != GO_ON and self.why == "Ctrl-C":
            os._exit(EXIT_INTERRUPTED)
        self._raise(STOP, "Ctrl-C")


@contextmanager
def handled(ask: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Route the driver's signals to `ask` within the block; restore the previous handlers afterwards.

    SIGINT and SIGHUP stay ignored if they were: under nohup or in a script's background they are not meant for us.
    """
    terminals = (signal.SIGINT, signal.SIGHUP)
    heard = [number for number in terminals if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in (*heard, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
