"""A few updates of one size under torch.profiler: how long each operator takes by itself."""

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
QUIET = "6"  # the profiler's library says on stderr when it starts and stops, unless it is asked for less than that
MARK = "launcher: "  # before a phase's name
ON_HOST = torch.autograd.DeviceType.CPU  # a kernel is on the device, and its time is also that of its operator
#: Collectives, by torch's and the backends' names: what they take is waiting for other workers.
WAITS = ("c10d", "gloo", "nccl", "record_param_comms", "ucc", "mpi")


def profiled(stand: Stand, size: int, items: Any, stage: str) -> Profiled | None:
    """The operators of one stage at this size, as rank 0 sees them: empty on the others, which make the same updates.

    None where memory ran out. Every rank calls it.

    Raises:
        Lost: memory ran out on this rank while others wait for it.
    """
    try:
        return survived(stand, size, partial(_updates, stand, size, items, stage))
    except Exhausted:
        return None


def _updates(stand: Stand, size: int, items: Any, stage: str) -> Profiled:
    """The updates before the profiled ones warm up the step, and one of them the profiler."""
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
    """Its phases are ranges in what the profiler sees."""

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
    """Milliseconds that operators begun within a stage take by themselves: on the device, where that is a GPU.

    The backward pass of a GPU runs on a thread of its own, so that only the time tells what belongs to a stage.
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
    """Neither a range that somebody named nor a collective."""
    return not (event.is_user_annotation or event.name.startswith((MARK, *WAITS)))
