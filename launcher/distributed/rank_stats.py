"""What each rank tells all others in every update: its loss count, its requests, and its results of the update before.

These numbers are a rank's row of a table that is summed with the gradients (`strategies.stats_exchange`). The table
stays on the device, where the loss count scales the gradients. The host reads it as soon as that needs no waiting: on a
CPU at once, on a GPU one update late. When a checkpoint is saved, the ranks exchange their rows once more. Apart from
tensors, the ranks exchange nothing else in the training loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from launcher.distributed.stop_requests import StopLevel
from launcher.errors import TrainingFailed
from launcher.plan.timeline import Update
from launcher.telemetry.stages import STAGES
from launcher.telemetry.stats_fields import DEVICE_FIELDS, NUM_STATS
from launcher.telemetry.tensor_sums import sum_rows_as_tree
from launcher.telemetry.update_scalars import UpdateScalars

__all__ = ["GatheredStats", "PendingStats", "RankStats", "sum_loss_counts"]

COUNT, STOP, SAVE, CALL_ORDER, LOSS_COUNT, GROUPS = range(6)  # columns, in the order of HOST_FIELDS
STAGE_COLUMNS = slice(GROUPS + 1, GROUPS + 1 + len(STAGES))
LOSS, FINITE, GRAD_NORM, GROUP_SQ_NORM_SUM = range(STAGE_COLUMNS.stop, NUM_STATS)  # in the order of DEVICE_FIELDS
NO_TIMES = (0.0,) * len(STAGES)


@dataclass(frozen=True)
class RankStats:
    """One rank's statistics.

    `count` is the loss count (samples or tokens) of *this* update, `call_order` a number for the order in which its
    forward passes called the parts of a sharded model (`strategies.call_order`). The `previous` scalars and the stage
    times (milliseconds) belong to the update before.
    """

    count: float = 0.0
    stop: float = StopLevel.CONTINUE
    save: float = 0.0
    call_order: float = 0.0
    previous: UpdateScalars = UpdateScalars()
    stages_ms: Sequence[float] = NO_TIMES

    def to_row(self, device: torch.device) -> torch.Tensor:
        """All numbers as a row of the table, float64 on the device; nothing is read from the device for it."""
        previous = self.previous
        host = (self.count, self.stop, self.save, self.call_order, previous.loss_count, previous.groups)
        scalars = [getattr(previous, name) for name in DEVICE_FIELDS]
        if device.type == "cpu":
            return torch.tensor([*host, *self.stages_ms, *map(float, scalars)], dtype=torch.float64)
        pinned = torch.tensor([*host, *self.stages_ms], dtype=torch.float64).pin_memory()
        on_device = [torch.as_tensor(scalar, device=device).detach().double() for scalar in scalars]
        return torch.cat([pinned.to(device, non_blocking=True), torch.stack(on_device)])


def sum_loss_counts(table: torch.Tensor) -> torch.Tensor:
    """The loss count of this update over all ranks, from the table on the device; a scalar that stays there."""
    return table[:, COUNT].sum()


@dataclass(frozen=True)
class GatheredStats:
    """The statistics of all ranks, read by the host; identical on every rank.

    `table` has a row for each rank. The count, the requests and the order of calls are of `update`, all others of
    `previous_update`, which is None for the first update after a start.
    """

    table: torch.Tensor
    update: Update | None = None
    previous_update: Update | None = None

    @classmethod
    def from_ranks(cls, ranks: Sequence[RankStats], *updates: Update | None) -> GatheredStats:
        """The statistics of these ranks, as if they had exchanged them."""
        rows = [stats.to_row(torch.device("cpu")) for stats in ranks]
        return cls(torch.stack(rows) if rows else torch.zeros(0, NUM_STATS, dtype=torch.float64), *updates)

    @cached_property
    def _sums(self) -> list[float]:
        return sum_rows_as_tree(self.table).tolist()

    @cached_property
    def _largest(self) -> list[float]:
        return self.table.amax(dim=0).tolist()

    @cached_property
    def _least(self) -> list[float]:
        return self.table.amin(dim=0).tolist()

    @property
    def world(self) -> int:
        """Number of ranks; 0 if nothing could be exchanged."""
        return len(self.table)

    @cached_property
    def stages_ms(self) -> torch.Tensor:
        """Milliseconds per rank and stage."""
        return self.table[:, STAGE_COLUMNS]

    @property
    def count(self) -> float:
        return self._sums[COUNT]

    @property
    def stop(self) -> StopLevel:
        return StopLevel(int(self._largest[STOP]))

    @property
    def save(self) -> bool:
        return self._largest[SAVE] > 0

    def check_call_order(self) -> None:
        """Check that all ranks called the parts of a sharded model in the same order.

        Raises:
            TrainingFailed: they did not, so the collectives of this update exchanged tensors of different parts.
        """
        if self._least[CALL_ORDER] != self._largest[CALL_ORDER]:
            raise TrainingFailed(
                "in this update the ranks called different parts of the model, or in another order (as with random "
                "layer drop), so that their gradients cannot be summed: let every rank call all parts in the same "
                "order, or type strategy=ddp, with strategy.find_unused_parameters=true where parts are left out"
            )

    @property
    def loss(self) -> float:
        """Summed loss of the previous update, over all ranks."""
        return self._sums[LOSS]

    @property
    def loss_count(self) -> float:
        """Loss count (samples or tokens) of the previous update, over all ranks."""
        return self._sums[LOSS_COUNT]

    @property
    def grad_norm(self) -> float:
        """Norm of the previous update's mean gradient; rank 0's value, so that all ranks use the same bits."""
        return float(self.table[0, GRAD_NORM])

    @property
    def group_sq_norm_sum(self) -> float:
        """Sum over the groups of the previous update: squared norm of the group's gradient over its loss count."""
        return self._sums[GROUP_SQ_NORM_SUM]

    @property
    def groups(self) -> int:
        """Number of groups of the previous update's batch whose gradient norms were measured separately."""
        return int(self._sums[GROUPS])

    @property
    def not_finite(self) -> tuple[int, ...]:
        """The ranks whose own loss of the previous update was NaN or infinite."""
        return tuple((~torch.isfinite(self.table[:, LOSS])).nonzero().flatten().tolist())

    @property
    def finite(self) -> bool:
        """Whether the previous update was applied."""
        return self._least[FINITE] > 0


class PendingStats:
    """The statistics of an update on their way from the device to the host."""

    def __init__(self, table: torch.Tensor, update: Update | None = None, previous_update: Update | None = None):
        self._updates = (update, previous_update)
        self._event: torch.cuda.Event | None = None
        self._table = table
        if table.is_cuda:
            self._table = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            self._table.copy_(table, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> GatheredStats:
        """Return the statistics. On a GPU this waits for their copy only, not for what follows it."""
        if self._event is not None:
            self._event.synchronize()
        return GatheredStats(self._table, *self._updates)
