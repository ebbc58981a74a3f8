"""Profile a few updates of one size with torch.profiler: the self time of each operator."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from launcher.timeline import Update
from launcher.tune.operators import Profiled
from launcher.tune.probe import Exhausted, Stand, Trial, rehearse, run_through, survived

__all__ = ["profiled"]

UPDATES = 3
QUIET = "6"  # log level of Kineto, which otherwise reports each start and stop on stderr
MARK = "launcher: "  # prefix of a phase's name
ON_HOST = torch.autograd.DeviceType.CPU  # kernels are on the device; their time is included in that of their operator
#: Name prefixes of collectives, of torch and the backends; their time is mostly waiting for other workers.
WAITS = ("c10d", "gloo", "nccl", "record_param_comms", "ucc", "mpi")


def profiled(stand: Stand, size: int, items: Any, stage: str) -> Profiled | None:
    """Profile the operators of one stage at this size on rank 0; other ranks run the same updates and return none.

    Returns None if memory ran out. Every rank calls it.

    Raises:
        Lost: memory ran out on this rank while others wait for it.
    """
    try:
        return survived(stand, size, partial(_updates, stand, size, items, stage))
    except Exhausted:
        return None


def _updates(stand: Stand, size: int, items: Any, stage: str) -> Profiled:
    """Warm up the step and, with one update, the profiler; then run the profiled updates."""
    trial = stand.trial(size, items)
    updates = trial.study.timeline.updates()
    rehearse(trial, next(updates), stand)
    run_through(trial, updates, stand.vote, trial.warm_up)
    if stand.topology.rank:
        run_through(trial, updates, stand.vote, 1 + UPDATES)
        return Profiled(size, {})
    os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
    activities = _activities(trial.parts.device)
    with profile(activities=activities):
        run_through(trial, updates, stand.vote, 1)
    marked = Marked(trial.study, trial.topology, trial.parts, trial.feed, trial.faults)
    with profile(activities=activities) as watched, marked.marks():
        run_through(marked, updates, stand.vote, UPDATES)
    times = by_operator(watched.events(), stage, cuda=trial.parts.device.type == "cuda")
    samples = UPDATES * size * trial.study.plan.accumulation
    return Profiled(size, {name: ms / samples for name, ms in times.items()})


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


@dataclass(frozen=True)
class Marked(Trial):
    """A `Trial` that marks its phases as profiler ranges."""

    open: list[Any] = field(default_factory=list)

    def at(self, phase: str, update: Update) -> None:
        self._close()
        self.open.append(record_function(MARK + phase))
        self.open[-1].__enter__()
        super().at(phase, update)

    @contextmanager
    def marks(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._close()

    def _close(self) -> None:
        while self.open:
            self.open.pop().__exit__(None, None, None)


def by_operator(events: Iterable[Any], stage: str, *, cuda: bool) -> Mapping[str, float]:
    """Self time in milliseconds of the operators that start within a stage; device time on a GPU.

    On a GPU the backward pass runs on its own thread, so operators are assigned to a stage by start time.
    """
    events = [one for one in events if one.device_type == ON_HOST]
    spans = [(one.time_range.start, one.time_range.end) for one in events if one.name == MARK + stage]
    times: dict[str, float] = {}
    for one in events:
        if _operator(one) and any(start <= one.time_range.start < end for start, end in spans):
            own_us = one.self_device_time_total if cuda else one.self_cpu_time_total
            times[one.name] = times.get(one.name, 0.0) + own_us / 1e3
    return times


def _operator(event: Any) -> bool:
    """Whether an event is an operator: neither a user-named range nor a collective."""
    return not (event.is_user_annotation or event.name.startswith((MARK, *WAITS)))
