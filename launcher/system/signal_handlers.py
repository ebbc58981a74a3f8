"""Signal handlers that are installed for a while and then restored."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["forward_signals_to", "list_not_ignored", "sigterm_as_keyboard_interrupt"]


@contextmanager
def forward_signals_to(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Route the driver's signals to `handler` within the block; restore the previous handlers afterwards.

    SIGINT and SIGHUP stay ignored if they were: under nohup or in a script's background they are not meant for us.
    """
    with install_handler(handler, [*list_not_ignored(signal.SIGINT, signal.SIGHUP), signal.SIGTERM, signal.SIGUSR1]):
        yield


@contextmanager
def sigterm_as_keyboard_interrupt() -> Iterator[None]:
    """Treat SIGTERM and a closed terminal like Ctrl-C, so that workers and the temporary folder are removed."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    with install_handler(interrupt, list_not_ignored(signal.SIGTERM, signal.SIGHUP)):
        yield


@contextmanager
def install_handler(
    handler: Callable[[int, FrameType | None], Any], signals: Iterable[signal.Signals]
) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only: they are the calling program's
        return
    previous = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for signum, previous_handler in previous.items():
            signal.signal(signum, previous_handler)


def list_not_ignored(*signals: signal.Signals) -> list[signal.Signals]:
    """The signals that this process does not ignore, e.g. because of nohup."""
    return [signum for signum in signals if signal.getsignal(signum) != signal.SIG_IGN]
