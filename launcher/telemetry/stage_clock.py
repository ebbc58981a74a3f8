"""Stage timing, deferred device scalars and resource metrics of an update.

The training loop calls `lap` on a `StageClock`: each lap assigns the time since the previous lap to a stage, so the
stages add up to the wall time by construction. On a GPU the laps are CUDA events on the stream, read one update later,
so the loop never waits for the device. There, time in which the device waits for the host counts towards the stage that
it waited for.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from launcher.plan.timeline import Update
from launcher.telemetry.stages import STAGES

__all__ = [
    "STAGES",
    "CudaTimer",
    "DeferredScalars",
    "HostTimer",
    "ResourceMeter",
    "StageClock",
    "Timer",
    "find_critical_rank",
    "measure_utilization",
    "read_memory_metrics",
]


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
        self._mark: Any = None
        self._waits: Callable[[], None] = lambda: None
        self._finished: tuple[Any, list[tuple[str, Any]]] | None = None

    def on_mark(self, waits: Callable[[], None]) -> None:
        """Register `waits`, which is called at each mark."""
        self._waits = waits

    def start(self) -> None:
        """Start timing now; earlier time is not attributed to any update."""
        self._last = self._timer.stamp()

    def lap(self, stage: str) -> None:
        """Assign the time since the last lap to `stage`."""
        self._laps.append((stage, self._timer.stamp()))

    def mark(self) -> None:
        """Mark the start of waiting: called from the communication hook of the last gradient bucket."""
        self._mark = self._timer.stamp()
        self._waits()

    def lap_backward(self) -> None:
        """Assign the time up to the mark to `backward` and the rest, exposed communication, to `sync`."""
        if self._mark is not None:
            self._laps.append(("backward", self._mark))
            self._mark = None
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


class DeferredScalars:
    """The results of one update: device scalars (loss, grad norm, spread, finite) and what the host knows about it.

    `count` is the loss count, `groups` the number of gradient groups that the spread covers, `update` is None before
    the first update. The scalars are copied to the host asynchronously; `read` waits only for that copy and is called
    during the next update. Without scalars, the values default to zero loss and finite=1. The last scalar must be a
    tensor: its device is used for the copy.
    """

    def __init__(
        self, scalars: Sequence[Any] = (), count: float = 0.0, groups: int = 0, update: Update | None = None
    ) -> None:
        self.count = count
        self.groups = groups
        self.update = update
        self._event: torch.cuda.Event | None = None
        self._values: torch.Tensor | tuple[float, ...] = (0.0, 0.0, 0.0, 1.0)
        if scalars:
            device = scalars[-1].device
            together = torch.stack([torch.as_tensor(scalar, device=device).detach().double() for scalar in scalars])
            self._values = self._copy_to_host(together) if together.is_cuda else together

    def _copy_to_host(self, together: torch.Tensor) -> torch.Tensor:
        pinned = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
        pinned.copy_(together, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()
        return pinned

    def read(self) -> tuple[float, float, float, float]:
        if self._event is not None:
            self._event.synchronize()
        loss, norm, spread, finite = self._values.tolist() if isinstance(self._values, torch.Tensor) else self._values
        return loss, norm, spread, finite


class ResourceMeter:
    """Wall time, memory and utilisation of this rank; memory and utilisation are sampled at most twice a second."""

    SAMPLE_EVERY_S = 0.5

    def __init__(
        self,
        device: torch.device,
        threads: int,
        before_s: float = 0.0,
        loading: Callable[[], float | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device = device
        self.threads = threads
        self._clock = clock
        self._before_s = before_s
        self._loading = loading
        self._values: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """Reset the clocks at the start of training."""
        self._start = self._last = self._sampled = self._clock()
        self._busy_s = time.process_time()

    def seconds(self) -> float:
        """Training time so far in seconds, including earlier generations."""
        return self._before_s + self._clock() - self._start

    def measure_wall_s(self) -> float:
        """Seconds since the previous call: the time of one update if called once per update."""
        now = self._clock()
        wall_s, self._last = now - self._last, now
        return wall_s

    def values(self) -> dict[str, float]:
        now = self._clock()
        if not self._values or now - self._sampled >= self.SAMPLE_EVERY_S:
            busy_s = time.process_time()
            share = measure_utilization(self.device, busy_s - self._busy_s, now - self._sampled, self.threads)
            self._sampled, self._busy_s = now, busy_s
            beside = {"device/utilization": share, "data/loader_cpu": self._loading()}
            self._values = read_memory_metrics(self.device) | {
                key: value for key, value in beside.items() if value is not None
            }
        return self._values


def read_memory_metrics(device: torch.device) -> dict[str, float]:
    """Memory metrics: on a GPU peak allocated bytes and allocator retries; on a CPU peak RSS and major page faults."""
    if device.type != "cuda":
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {"memory/peak_bytes": usage.ru_maxrss * 1024, "memory/major_faults": usage.ru_majflt}
    stats = torch.cuda.memory_stats(device)
    return {
        "memory/peak_bytes": stats.get("allocated_bytes.all.peak", 0),
        "memory/alloc_retries": stats.get("num_alloc_retries", 0),
    }


def measure_utilization(device: torch.device, busy_s: float, wall_s: float, threads: int) -> float | None:
    """Share of time the device was busy: from NVML on a GPU, process time over wall time x threads on a CPU."""
    if device.type == "cuda":
        try:
            return torch.cuda.utilization(device) / 100
        except Exception:  # NVML errors share no base class: omit the value rather than guess
            return None
    return min(1.0, busy_s / (wall_s * threads)) if wall_s > 0 else None


def find_critical_rank(stages_ms: Sequence[Sequence[float]]) -> int:
    """The rank that the others waited for: the one with the least `sync` time; ties go to the lower rank."""
    sync = STAGES.index("sync")
    return min(range(len(stages_ms)), key=lambda rank: stages_ms[rank][sync])
