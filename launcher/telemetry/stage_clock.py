"""Stage times of an update.

The training loop calls `lap` on a `StageClock`: each lap assigns the time since the previous lap to a stage, so the
stages add up to the wall time by construction. On a GPU the laps are CUDA events on the stream, read one update later,
so the loop never waits for the device. There, time in which the device waits for the host counts towards the stage that
it waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from launcher.telemetry.stages import STAGES

__all__ = ["STAGES", "CudaTimer", "HostTimer", "StageClock", "Timer", "find_critical_rank"]

SYNC = STAGES.index("sync")


class Timer(Protocol):
    def stamp(self) -> Any: ...

    def elapsed_ms(self, start: Any, end: Any) -> float: ...


class HostTimer:
    """The host's monotonic clock; correct if the host does the work or waits for it."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.stamp = clock

    def elapsed_ms(self, start: float, end: float) -> float:
        return (end - start) * 1e3


class CudaTimer:
    """CUDA events on the current stream. `elapsed_ms` waits for the later event only, never for the device."""

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end)


class StageClock:
    """Records the laps of the current update and the stage times of the last finished update."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._laps: list[tuple[str, Any]] = []
        self._last = timer.stamp()
        self._wait_began: Any = None
        self._on_mark: Callable[[], None] = lambda: None
        self._finished: tuple[Any, list[tuple[str, Any]]] | None = None

    def on_wait_begin(self, callback: Callable[[], None]) -> None:
        """Register a function that is called at each mark."""
        self._on_mark = callback

    def start(self) -> None:
        """Start timing now; earlier time is not attributed to any update."""
        self._last = self._timer.stamp()

    def lap(self, stage: str) -> None:
        """Assign the time since the last lap to `stage`."""
        self._laps.append((stage, self._timer.stamp()))

    def begin_wait(self) -> None:
        """Mark the start of waiting: called from the communication hook of the last gradient bucket."""
        self._wait_began = self._timer.stamp()
        self._on_mark()

    def lap_backward(self) -> None:
        """Assign the time up to the mark to `backward` and the rest, exposed communication, to `sync`."""
        if self._wait_began is not None:
            self._laps.append(("backward", self._wait_began))
            self._wait_began = None
            self.lap("sync")
        else:
            self.lap("backward")

    def end_update(self) -> None:
        """End the update; `times_ms` returns its times until the next update ends."""
        self.lap("other")
        self._finished = (self._last, self._laps)
        self._last, self._laps = self._laps[-1][1], []

    def times_ms(self) -> tuple[float, ...]:
        """Milliseconds per stage of the last finished update, in the order of `STAGES`; zeros before the first."""
        times = dict.fromkeys(STAGES, 0.0)
        if self._finished is not None:
            start, laps = self._finished
            for stage, stamp in laps:
                times[stage] += self._timer.elapsed_ms(start, stamp)
                start = stamp
        return tuple(times.values())


def find_critical_rank(stages_ms: torch.Tensor | Sequence[Sequence[float]]) -> int:
    """The rank that the others waited for: the one with the least `sync` time; ties go to the lower rank."""
    if isinstance(stages_ms, torch.Tensor):
        return int(stages_ms[:, SYNC].argmin())
    waits_ms = [times_ms[SYNC] for times_ms in stages_ms]
    return waits_ms.index(min(waits_ms))
