"""Imports without garbage collection, for the processes of a job, whose start is mostly imports."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["own_this_process", "paused_garbage_collection"]

_owned = False


def own_this_process() -> None:
    """This process runs nothing but the launcher, so that `paused_garbage_collection` may act on all of its objects."""
    global _owned
    _owned = True


@contextmanager
def paused_garbage_collection(*, freeze: bool = True) -> Iterator[None]:
    """Collect no garbage in this block, which imports modules; later collections do not look at what exists by then.

    Importing torch and what it uses creates about a million objects and hardly any garbage. Looking for it again and
    again takes an eighth of the time. In a process that is not the launcher's own nothing changes: garbage that exists
    by then would stay for ever. With `freeze=False` it is collected later, for modules of the user.
    """
    if not _owned or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        gc.enable()
