"""Signal handlers that are installed for a while and then restored."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["forward_signals_to", "sigterm_as_keyboard_interrupt"]


@contextmanager
def forward_signals_to(ask: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
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


@contextmanager
def sigterm_as_keyboard_interrupt() -> Iterator[None]:
    """Treat SIGTERM and a closed terminal like Ctrl-C, so that workers and the temporary folder are removed."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
