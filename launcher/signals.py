"""What the outside asks of a worker: to save and stop, to save and be started again, to save and let a node in.

A signal only raises a flag; the ranks agree on it in the next vote. Rank 0 also looks into the run folder: for the
`stop` file, and for nodes that wait at the gate.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Protocol

from launcher.errors import EXIT_AGAIN, EXIT_INTERRUPTED

__all__ = ["GO_ON", "JOIN", "LEAVE", "STOP", "Folder", "Wishes"]

GO_ON, JOIN, STOP, LEAVE = 0, 1, 2, 3  # LEAVE: save and be started again by the agent; the larger outweighs

LOOK_EVERY_S = 0.2
LEAVE_S = 5.0


class Folder(Protocol):
    """What a run folder may ask."""

    def asks_to_stop(self) -> bool: ...
    def asks_to_join(self) -> bool: ...


class Wishes:
    """The flags raised so far. `install` it before anything slow, so that no wish to stop ends the process by default.

    SIGTERM keeps its default until `guard`: before training there is nothing to save, and a rank that waits for the
    others in torch's code would only hear of it later, while its agent waits 30 s for it. A rank that was told to
    leave and gets no agreement within `leave_s` leaves unsaved: the others are gone, or stuck.
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
        """Training begins: from now on SIGTERM means to save first."""
        signal.signal(signal.SIGTERM, self._asked_to_leave)

    def heard(self) -> None:
        """The ranks have agreed to stop or to leave: from now on saving takes as long as it takes."""
        self._heard.set()

    def done(self) -> None:
        """Nothing is left to be asked: a late SIGUSR1 must not end the interpreter while it tidies up."""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def read(self, folder: Folder | None) -> int:
        """The present wish. `folder` is given on rank 0 alone and looked into a few times a second."""
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
        """The present wish, as far as signals tell."""
        return self._wish

    def granted(self) -> None:
        """The gate was open long enough: the wish to let a node in is over."""
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
