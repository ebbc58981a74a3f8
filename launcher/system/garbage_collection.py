"""Imports without garbage collection, for processes of the job, whose start is mostly imports."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["paused_garbage_collection"]


@contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Collect no garbage in this block, which imports modules; later collections do not look at what exists by then.

    Importing torch and what it uses creates about a million objects and hardly any garbage. Looking for it again and
    again takes an eighth of the time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
