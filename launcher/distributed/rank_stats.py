"""The all-gather of per-rank statistics, once per update.

One small float64 vector per rank is all-gathered on a separate gloo group. It is started after the last micro-batch's
forward pass and awaited before the optimizer step, so that it overlaps with the backward pass. When a checkpoint is
saved, the ranks gather once more. Apart from tensors, the ranks exchange nothing else in the training loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from launcher.distributed.stop_requests import StopLevel
from launcher.errors import TrainingFailed
from launcher.plan.virtual_shards import compute_tree_sum
from launcher.telemetry.deferred_scalars import UpdateScalars
from launcher.telemetry.stages import STAGES

__all__ = ["GatheredStats", "PendingStats", "RankStats", "StatsAllGather"]


@dataclass(frozen=True)
class RankStats:
    """One rank's statistics.

    `count` is the loss count (samples or tokens) of *this* update, `call_order` a number for the order in which its
    forward passes called the parts of a sharded model (`strategies.call_order`). The `previous` scalars and the stage
    times (milliseconds) belong to the update before: values computed on the device are read one update late.
    """

    count: float = 0.0
    stop: float = StopLevel.CONTINUE
    save: float = 0.0
    call_order: float = 0.0
    previous: UpdateScalars = UpdateScalars()

    def to_row(self) -> tuple[float, ...]:
        """All values as a flat row of numbers."""
        return (self.count, self.stop, self.save, self.call_order, *astuple(self.previous))

    @classmethod
    def from_row(cls, row: Sequence[float]) -> RankStats:
        """Inverse of `to_row`."""
        count, stop, save, call_order, *previous = row
        return cls(count, stop, save, call_order, UpdateScalars(*previous))


NUM_FIELDS = len(RankStats().to_row())


@dataclass(frozen=True)
class GatheredStats:
    """The statistics and stage times of all ranks, in rank order; identical on every rank.

    `count`, `stop`, `save` and the order of calls are of the current update, all others of the previous one.
    """

    rank_stats: tuple[RankStats, ...]
    stages_ms: tuple[tuple[float, ...], ...]

    @property
    def count(self) -> float:
        return float(compute_tree_sum(stats.count for stats in self.rank_stats))

    @property
    def stop(self) -> StopLevel:
        return StopLevel(int(max(stats.stop for stats in self.rank_stats)))

    @property
    def save(self) -> bool:
        return any(stats.save for stats in self.rank_stats)

    def check_call_order(self) -> None:
        """Check that all ranks called the parts of a sharded model in the same order.

        Raises:
            TrainingFailed: they did not, so the collectives of this update exchanged tensors of different parts.
        """
        if len({stats.call_order for stats in self.rank_stats}) > 1:
            raise TrainingFailed(
                "in this update the ranks called different parts of the model, or in another order (as with random "
                "layer drop), so that their gradients cannot be summed: let every rank call all parts in the same "
                "order, or type strategy=ddp, with strategy.find_unused_parameters=true where parts are left out"
            )

    @property
    def loss(self) -> float:
        """Summed loss of the previous update, over all ranks."""
        return float(compute_tree_sum(stats.previous.loss for stats in self.rank_stats))

    @property
    def loss_count(self) -> float:
        """Loss count (samples or tokens) of the previous update, over all ranks."""
        return float(compute_tree_sum(stats.previous.loss_count for stats in self.rank_stats))

    @property
    def grad_norm(self) -> float:
        """Norm of the previous update's mean gradient; rank 0's value, so that all ranks use the same bits."""
        return float(self.rank_stats[0].previous.grad_norm)

    @property
    def group_sq_norm_sum(self) -> float:
        """Sum over the groups of the previous update: squared norm of the group's gradient over its loss count."""
        return float(compute_tree_sum(stats.previous.group_sq_norm_sum for stats in self.rank_stats))

    @property
    def groups(self) -> int:
        """Number of groups of the previous update's batch whose gradient norms were measured separately."""
        return int(sum(stats.previous.groups for stats in self.rank_stats))

    @property
    def not_finite(self) -> tuple[int, ...]:
        """The ranks whose own loss of the previous update was NaN or infinite."""
        return tuple(rank for rank, stats in enumerate(self.rank_stats) if not math.isfinite(stats.previous.loss))

    @property
    def finite(self) -> bool:
        """Whether the previous update was applied."""
        return all(stats.previous.finite for stats in self.rank_stats)


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

    def all_gather_async(self, stats: RankStats, stages_ms: Sequence[float]) -> PendingStats:
        """Start the exchange. Only one may be in flight: the buffers are reused."""
        self._values[:] = torch.tensor((*stats.to_row(), *stages_ms), dtype=torch.float64)
        if self._group is None:
            self._all[:] = self._values
            return _PendingGather(self._all, None)
        work = all_gather(self._all, self._values, group=self._group, async_op=True)
        return _PendingGather(self._all, work)

    def gather_number(self, value: float, within_s: float | None = None) -> list[float]:
        """The numbers of all ranks, in rank order; every rank must call this, while no exchange is in flight.

        Raises:
            RuntimeError: a rank was lost, or not all ranks called this within `within_s` seconds.
        """
        if self._group is None:
            return [value]
        numbers = torch.zeros(self._world, dtype=torch.float64)
        work = all_gather(numbers, torch.tensor([value], dtype=torch.float64), group=self._group, async_op=True)
        work.wait(*([] if within_s is None else [timedelta(seconds=within_s)]))
        return list(numbers.tolist())


@dataclass(frozen=True)
class _PendingGather:
    values: torch.Tensor
    work: dist.Work | None

    def wait(self) -> GatheredStats:
        if self.work is not None:
            self.work.wait()
        rows = self.values.view(-1, NUM_FIELDS + len(STAGES)).tolist()
        return GatheredStats(
            rank_stats=tuple(RankStats.from_row(row[:NUM_FIELDS]) for row in rows),
            stages_ms=tuple(tuple(row[NUM_FIELDS:]) for row in rows),
        )
