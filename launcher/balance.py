"""Shares that follow measured speeds (`elastic.balance`): the fast workers take more of the same global batch.

Every rank sees the same stage times in the vote, so each works out the same shares and nobody has to be told. The
gradient stays that of the whole batch, whatever the shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from launcher.batch import BatchPlan, PlanError
from launcher.stages import BY_SAMPLE, STAGES
from launcher.timeline import Update

__all__ = ["WINDOW", "Balancer", "Level", "Speeds", "better"]

WINDOW = 20
LEAST_GAIN = 1.05


@dataclass(frozen=True)
class Speeds:
    """Milliseconds of own work per update and rank, over the last whole updates under one plan."""

    plan: BatchPlan
    window: tuple[tuple[float, ...], ...] = field(default=())

    def observed(self, work_ms: Sequence[float]) -> Speeds:
        """With one more update: each rank's own work in it."""
        return Speeds(self.plan, (*self.window, tuple(work_ms))[-WINDOW:])

    @property
    def samples_per_ms(self) -> tuple[float, ...] | None:
        """Each rank's median; None until the window is full, or where a rank had no samples to measure."""
        if len(self.window) < WINDOW or 0 in self.plan.shares:
            return None
        work_ms = [median(times) for times in zip(*self.window, strict=True)]
        if min(work_ms) <= 0:
            return None
        return tuple(share / ms for share, ms in zip(self.plan.shares, work_ms, strict=True))


def better(measured: Speeds, planned: Callable[[Sequence[float]], BatchPlan]) -> tuple[float, ...] | None:
    """The speeds to plan by where that makes the slowest rank faster by more than 5 %; else None.

    Less is noise, and a change costs the data that loaders had prefetched.
    """
    speeds = measured.samples_per_ms
    if speeds is None:
        return None
    try:
        plan = planned(speeds)
    except PlanError:  # a rank so slow that it would get nothing
        return None
    before, after = (slowest_ms(shares, speeds) for shares in (measured.plan.shares, plan.shares))
    return speeds if before > LEAST_GAIN * after else None


def slowest_ms(shares: Sequence[int], speeds: Sequence[float]) -> float:
    """Milliseconds per sample of the batch until the last rank is done."""
    return max(share / speed for share, speed in zip(shares, speeds, strict=True)) / sum(shares)


class Balancer:
    """Watches the votes of a run; `wants` holds the speeds to plan by, once that is better than the plan in force."""

    def __init__(self, plan: BatchPlan, planned: Callable[[Sequence[float]], BatchPlan]) -> None:
        self.wants: tuple[float, ...] | None = None
        self._planned = planned
        self._speeds = Speeds(plan)
        self._seen = 0
        self._before: Update | None = None

    def agreed(self, stages_ms: Sequence[Sequence[float]], update: Update) -> None:
        """The vote in `update`; its stage times are those of the update before."""
        before, self._before = self._before, update
        if before is None or before.tail:
            return
        if before.nominal != self._speeds.plan:  # a stage of batch.ramp
            self._speeds = Speeds(before.nominal)
        own = [STAGES.index(stage) for stage in BY_SAMPLE]
        self._speeds = self._speeds.observed([sum(times[stage] for stage in own) for times in stages_ms])
        self._seen += 1
        if self._seen % WINDOW == 0:
            self.wants = better(self._speeds, self._planned)


class Level:
    """Shares stay as they are planned."""

    wants: tuple[float, ...] | None = None

    def agreed(self, stages_ms: Sequence[Sequence[float]], update: Update) -> None: ...
