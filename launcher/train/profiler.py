"""Run torch.profiler around a few updates and write the trace into the run directory (`train.profile=10-13`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from launcher.plan.timeline import Update

__all__ = ["profile_updates"]


def parse_update_range(text: str) -> tuple[int, int]:
    """Parse first and last update, counted from 1 as in metrics.jsonl.

    Raises:
        UsageError: not of the form 10-13.
    """
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit()) or not 1 <= int(first) <= int(last or first):
        raise UsageError(f"train.profile={text} is not a range of updates: type train.profile=10-13")
    return int(first), int(last or first)


def profile_updates(updates: Iterable[Update], which: str | None, folder: Path, rank: int) -> Iterator[Update]:
    """Yield the updates unchanged, with those in the range `which` profiled and the trace written to `folder`.

    The trace is also written if the run ends within the range. Only rank 0 is profiled: the other ranks do the same
    work at the same time.
    """
    if which is None or rank > 0:
        yield from updates
        return
    from torch.profiler import profile

    first, last = parse_update_range(which)
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
                write_trace(profiler, folder / f"profile-{first}-{last}.json")
    finally:
        if running:
            write_trace(profiler, folder / f"profile-{first}-{last}.json")


def write_trace(profiler: Any, path: Path) -> None:
    profiler.stop()
    profiler.export_chrome_trace(str(path))
