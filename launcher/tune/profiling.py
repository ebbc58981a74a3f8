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

from launcher.plan.timeline import Update
from launcher.tune.operators import OperatorProfile
from launcher.tune.probe import AgreedOom, ProbeContext, SizeTrial, dry_run_update, guard_oom, run_updates

__all__ = ["profile_operators"]

PROFILED_UPDATES = 3
KINETO_LOG_LEVEL = "6"  # log level of Kineto, which otherwise reports each start and stop on stderr
PHASE_PREFIX = "launcher: "  # prefix of a phase's name
#: Device type of operators; kernels are on the device, and their time is included in that of their operator.
HOST_DEVICE_TYPE = torch.autograd.DeviceType.CPU
#: Name prefixes of collectives, of torch and the backends; their time is mostly waiting for other workers.
COLLECTIVE_NAMES = ("c10d", "gloo", "nccl", "record_param_comms", "ucc", "mpi")


def profile_operators(context: ProbeContext, size: int, items: Any, stage: str) -> OperatorProfile | None:
    """Profile the operators of one stage at this size on rank 0; other ranks run the same updates and return none.

    Returns None if memory ran out. Every rank calls it.

    Raises:
        OomInCollective: memory ran out on this rank while others wait for it.
    """
    try:
        return guard_oom(context, size, partial(_profile_updates, context, size, items, stage))
    except AgreedOom:
        return None


def _profile_updates(context: ProbeContext, size: int, items: Any, stage: str) -> OperatorProfile:
    """Warm up the step and, with one update, the profiler; then run the profiled updates."""
    trial = context.make_trial(size, items)
    updates = trial.training_plan.timeline.iter_updates()
    dry_run_update(trial, next(updates), context)
    run_updates(trial, updates, trial.warmup_updates)
    if context.topology.rank:
        run_updates(trial, updates, 1 + PROFILED_UPDATES)
        return OperatorProfile(size, {})
    os.environ.setdefault("KINETO_LOG_LEVEL", KINETO_LOG_LEVEL)
    activities = _list_activities(trial.components.device)
    with profile(activities=activities):
        run_updates(trial, updates, 1)
    marked = ProfiledTrial(trial.training_plan, trial.topology, trial.components, trial.loader, trial.faults)
    with profile(activities=activities) as profiler, marked.mark_phases():
        run_updates(marked, updates, PROFILED_UPDATES)
    times = sum_by_operator(profiler.events(), stage, cuda=trial.components.device.type == "cuda")
    samples = PROFILED_UPDATES * size * trial.training_plan.batch_plan.accumulation
    return OperatorProfile(size, {name: ms / samples for name, ms in times.items()})


def _list_activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


@dataclass(frozen=True)
class ProfiledTrial(SizeTrial):
    """A `SizeTrial` that marks its phases as profiler ranges."""

    open: list[Any] = field(default_factory=list)

    def enter_phase(self, phase: str, update: Update) -> None:
        self._close_range()
        self.open.append(record_function(PHASE_PREFIX + phase))
        self.open[-1].__enter__()
        super().enter_phase(phase, update)

    @contextmanager
    def mark_phases(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._close_range()

    def _close_range(self) -> None:
        while self.open:
            self.open.pop().__exit__(None, None, None)


def sum_by_operator(events: Iterable[Any], stage: str, *, cuda: bool) -> Mapping[str, float]:
    """Self time in milliseconds of the operators that start within a stage; device time on a GPU.

    On a GPU the backward pass runs on its own thread, so operators are assigned to a stage by start time.
    """
    events = [event for event in events if event.device_type == HOST_DEVICE_TYPE]
    spans = [(event.time_range.start, event.time_range.end) for event in events if event.name == PHASE_PREFIX + stage]
    times: dict[str, float] = {}
    for event in events:
        if _is_operator(event) and any(start <= event.time_range.start < end for start, end in spans):
            self_us = event.self_device_time_total if cuda else event.self_cpu_time_total
            times[event.name] = times.get(event.name, 0.0) + self_us / 1e3
    return times


def _is_operator(event: Any) -> bool:
    """Whether an event is an operator: neither a user-named range nor a collective."""
    return not (event.is_user_annotation or event.name.startswith((PHASE_PREFIX, *COLLECTIVE_NAMES)))
