"""The all-gather of per-rank statistics, once per update.

One small float64 vector per rank is all-gathered on a separate gloo group. It is started after the last micro-batch's
forward pass and awaited before the optimizer step, so that it overlaps with the backward pass. It is the only
agreement between ranks in the training loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from launcher.distributed.stop_requests import GO_ON
from launcher.plan.virtual_shards import compute_tree_sum
from launcher.telemetry.stages import STAGES

__all__ = ["GatheredStats", "RankStats", "StatsAllGather"]


@dataclass(frozen=True)
class RankStats:
    """One rank's statistics.

    Values computed on the device belong to the previous update: they are read one update late. `count` is the loss
    count (samples or tokens) of *this* update; the fields from `loss` on and the stage times (milliseconds) belong to
    the previous one. `norm`, `spread` and `groups` come from its `strategies.Step`.
    """

    count: float = 0.0
    stop: float = GO_ON
    save: float = 0.0
    loss: float = 0.0
    loss_count: float = 0.0
    finite: float = 1.0
    norm: float = 0.0
    group_grad_norm_sum: float = 0.0
    groups: float = 0.0


NUM_FIELDS = len(fields(RankStats))


@dataclass(frozen=True)
class GatheredStats:
    """The statistics and stage times of all ranks, in rank order; identical on every rank."""

    rank_stats: tuple[RankStats, ...]
    stages_ms: tuple[tuple[float, ...], ...]

    @property
    def count(self) -> float:
        return float(compute_tree_sum(ballot.count for ballot in self.rank_stats))

    @property
    def stop(self) -> int:
        return int(max(ballot.stop for ballot in self.rank_stats))

    @property
    def save(self) -> bool:
        return any(ballot.save for ballot in self.rank_stats)

    @property
    def loss(self) -> float:
        """Summed loss of the previous update, over all ranks."""
        return float(compute_tree_sum(ballot.loss for ballot in self.rank_stats))

    @property
    def loss_count(self) -> float:
        """Loss count (samples or tokens) of the previous update, over all ranks."""
        return float(compute_tree_sum(ballot.loss_count for ballot in self.rank_stats))

    @property
    def norm(self) -> float:
        """Norm of the previous update's mean gradient; rank 0's value, so that all ranks use the same bits."""
        return self.rank_stats[0].norm

    @property
    def group_grad_norm_sum(self) -> float:
        """The sum of |h|²/c over the groups of the previous update."""
        return float(compute_tree_sum(ballot.group_grad_norm_sum for ballot in self.rank_stats))

    @property
    def groups(self) -> int:
        """Number of groups of the previous update's batch whose gradient norms were measured separately."""
        return int(sum(ballot.groups for ballot in self.rank_stats))

    @property
    def not_finite(self) -> tuple[int, ...]:
        """The ranks whose own loss of the previous update was NaN or infinite."""
        return tuple(rank for rank, ballot in enumerate(self.rank_stats) if not math.isfinite(ballot.loss))

    @property
    def finite(self) -> bool:
        """Whether the previous update was applied."""
        return all(ballot.finite for ballot in self.rank_stats)


#: The name changed in torch 2.13.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class PendingStats(Protocol):
    def wait(self) -> GatheredStats: ...


class StatsAllGather:
    """Exchanges the statistics. With one worker no process group is created and nothing is sent."""

    def __init__(self, world: int, timeout_s: float) -> None:
        self._world = world
        self._values = torch.zeros(NUM_FIELDS + len(STAGES), dtype=torch.float64)
        self._all = torch.zeros(world * (NUM_FIELDS + len(STAGES)), dtype=torch.float64)
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if world > 1 else None

    def all_gather_async(self, ballot: RankStats, stages_ms: Sequence[float]) -> PendingStats:
        """Start the exchange. Only one may be in flight: the buffers are reused."""
        self._values[:] = torch.tensor((*astuple(ballot), *stages_ms), dtype=torch.float64)
        if self._group is None:
            self._all[:] = self._values
            return _PendingGather(self._all, None)
        work = all_gather(self._all, self._values, group=self._group, async_op=True)
        return _PendingGather(self._all, work)


@dataclass(frozen=True)
class _PendingGather:
    values: torch.Tensor
    work: dist.Work | None

    def wait(self) -> GatheredStats:
        if self.work is not None:
            self.work.wait()
        rows = self.values.view(-1, NUM_FIELDS + len(STAGES)).tolist()
        return GatheredStats(
            rank_stats=tuple(RankStats(*row[:NUM_FIELDS]) for row in rows),
            stages_ms=tuple(tuple(row[NUM_FIELDS:]) for row in rows),
        )
