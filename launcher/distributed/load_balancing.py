"""Shares of the global batch that follow measured speeds (`elastic.balance`): faster workers take more samples.

Every rank receives the same stage times with the gradients of every update, so each computes the same shares without
further communication. The gradient is that of the whole batch, whatever the shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from launcher.plan.batch import BatchPlan, PlanError
from launcher.plan.timeline import Update
from launcher.telemetry.stage_metrics import StageTimes, as_time_tensor, median_of_rows, sum_stages
from launcher.telemetry.stages import PER_SAMPLE_STAGES, STAGES

__all__ = ["BALANCE_WINDOW", "LoadBalancer", "SpeedWindow", "find_faster_shares"]

BALANCE_WINDOW = 20
MIN_SPEEDUP = 1.05
WORK_INDICES = tuple(STAGES.index(stage) for stage in PER_SAMPLE_STAGES)


@dataclass(frozen=True, eq=False)
class SpeedWindow:
    """Milliseconds of own work per update (one tensor each) and rank, over the last full updates under one plan."""

    plan: BatchPlan
    window: tuple[torch.Tensor, ...] = field(default=())

    def with_update(self, work_ms: torch.Tensor | Sequence[float]) -> SpeedWindow:
        """Add one update: the milliseconds of own work of each rank."""
        return SpeedWindow(self.plan, (*self.window, as_time_tensor(work_ms))[-BALANCE_WINDOW:])

    @property
    def samples_per_ms(self) -> tuple[float, ...] | None:
        """Each rank's speed from its median time; None until the window is full, or if a rank has no samples."""
        if len(self.window) < BALANCE_WINDOW or 0 in self.plan.shares:
            return None
        work_ms = median_of_rows(torch.stack(self.window))
        if work_ms.min() <= 0:
            return None
        return tuple((torch.tensor(self.plan.shares, dtype=torch.float64) / work_ms).tolist())


def find_faster_shares(
    measured: SpeedWindow, make_plan: Callable[[Sequence[float]], BatchPlan]
) -> tuple[float, ...] | None:
    """Return the measured speeds if planning with them makes the slowest rank more than 5 % faster; else None.

    A smaller gain is noise, and every change discards the data that the loaders have prefetched.
    """
    speeds = measured.samples_per_ms
    if speeds is None:
        return None
    try:
        plan = make_plan(speeds)
    except PlanError:  # a rank is so slow that it would get no samples
        return None
    before, after = (compute_slowest_ms(shares, speeds) for shares in (measured.plan.shares, plan.shares))
    return speeds if before > MIN_SPEEDUP * after else None


def compute_slowest_ms(shares: Sequence[int], speeds: Sequence[float]) -> float:
    """Milliseconds per sample of the batch until the slowest rank has finished."""
    return max(share / speed for share, speed in zip(shares, speeds, strict=True)) / sum(shares)


class LoadBalancer:
    """Collects stage times during a run; sets `new_speeds` once a plan based on them beats the current plan."""

    def __init__(self, plan: BatchPlan, make_plan: Callable[[Sequence[float]], BatchPlan]) -> None:
        self.new_speeds: tuple[float, ...] | None = None
        self._make_plan = make_plan
        self._speeds = SpeedWindow(plan)
        self._seen = 0
        self._previous: Update | None = None

    def on_gathered(self, stages_ms: StageTimes, update: Update) -> None:
        """Record the statistics gathered in `update`; the stage times belong to the previous update."""
        previous, self._previous = self._previous, update
        if previous is None or previous.is_partial:
            return
        if previous.full_plan != self._speeds.plan:  # batch.ramp has entered a new stage
            self._speeds = SpeedWindow(previous.full_plan)
        self._speeds = self._speeds.with_update(sum_stages(as_time_tensor(stages_ms), WORK_INDICES))
        self._seen += 1
        if self._seen % BALANCE_WINDOW == 0:
            self.new_speeds = find_faster_shares(self._speeds, self._make_plan)
