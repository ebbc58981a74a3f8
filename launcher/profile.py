"""torch.profiler round a few updates, into the run folder (`train.profile=10-13`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from launcher.errors import RequestError
from launcher.timeline import Update

__all__ = ["profiled"]


def window(text: str) -> tuple[int, int]:
    """First and last update, counted from 1 as in metrics.jsonl.

    Raises:
        RequestError: not of the form 10-13.
    """
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit()) or not 1 <= int(first) <= int(last or first):
        raise RequestError(f"train.profile={text} is no range of updates: type train.profile=10-13")
    return int(first), int(last or first)


def profiled(updates: Iterable[Update], which: str | None, folder: Path, rank: int) -> Iterator[Update]:
    """The same updates; those of `which`, as far as the run comes, under the profiler, whose trace lands in `folder`.

    Rank 0 alone is profiled: the others do the same at the same time.
    """
    if which is None or rank > 0:
        yield from updates
        return
    from torch.profiler import profile

    first, last = window(which)
    profiler = profile()
    running = False
    try:
        for update in updates:
            if update.index + 1 == first:
                profiler.start()
                running = True
            yield update
            if running and update.index + 1 == last:
                running = False
                write(profiler, folder / f"profile-{first}-{last}.json")
    finally:
        if running:
            write(profiler, folder / f"profile-{first}-{last}.json")


def write(profiler: Any, path: Path) -> None:
    profiler.stop()
    profiler.export_chrome_trace(str(path))
    path.chmod(0o600)
