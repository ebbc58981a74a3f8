"""What each rank tells all others in every update: its loss count, its requests, and its results of the update before.

These numbers are a rank's row of a table that is summed with the gradients (`strategies.stats_exchange`). The table
stays on the device, where the loss count scales the gradients. The host reads it as soon as that needs no waiting: on a
CPU at once, on a GPU one update late. When a checkpoint is saved, the ranks exchange their rows once more. Apart from
tensors, the ranks exchange nothing else in the training loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from launcher.distributed.stop_requests import StopLevel
from launcher.errors import TrainingFailed
from launcher.plan.timeline import Update
from launcher.plan.virtual_shards import compute_tree_sum
from launcher.telemetry.stage_metrics import StageTimes
from launcher.telemetry.stages import STAGES
from launcher.telemetry.stats_fields import DEVICE_FIELDS, NUM_STATS, StatsRow
from launcher.telemetry.tensor_sums import sum_rows_as_tree
from launcher.telemetry.update_scalars import UpdateScalars

__all__ = ["GatheredStats", "PendingStats", "RankStats", "sum_loss_counts"]

COUNT, STOP, SAVE, CALL_ORDER, LOSS_COUNT, GROUPS = range(6)  # columns, in the order of HOST_FIELDS
STAGE_COLUMNS = slice(GROUPS + 1, GROUPS + 1 + len(STAGES))
LOSS, FINITE, GRAD_NORM, GROUP_SQ_NORM_SUM = range(STAGE_COLUMNS.stop, NUM_STATS)  # in the order of DEVICE_FIELDS
POLL_S = 0.0002
FEW_RANKS = 16
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

    def to_row(self, device: torch.device) -> StatsRow:
        """All numbers as a row of the table; on a GPU nothing is read from the device for it."""
        previous = self.previous
        host = [self.count, self.stop, self.save, self.call_order, previous.loss_count, previous.groups]
        host += self.stages_ms
        scalars = [getattr(previous, name) for name in DEVICE_FIELDS]
        if device.type == "cpu":
            return [*host, *map(float, scalars)]
        pinned = torch.tensor(host, dtype=torch.float64).pin_memory()
        on_device = [
            scalar.detach().double() if isinstance(scalar, torch.Tensor) else pinned.new_full((), scalar, device=device)
            for scalar in scalars
        ]
        return torch.cat([pinned.to(device, non_blocking=True), torch.stack(on_device)])


def sum_loss_counts(table: torch.Tensor) -> torch.Tensor:
    """The loss count of this update over all ranks, from the table on the device; a scalar that stays there.

    The order of the sum does not depend on the number of ranks, for counts that are not whole.
    """
    return sum_rows_as_tree(table[:, :, COUNT].sum(dim=1))


class GatheredStats:
    """The statistics of all ranks, read by the host; identical on every rank.

    The count, the requests and the order of calls are of `update`, all others of `previous_update`, which is None for
    the first update after a start. `world` is the number of ranks, 0 if nothing could be exchanged.
    """

    def __init__(self, table: torch.Tensor, update: Update | None = None, previous_update: Update | None = None):
        """`table` has the shape (ranks, words, fields): a number is the sum of its words."""
        self.update, self.previous_update = update, previous_update
        self.world = len(table)
        # for few ranks, tensor operations would take longer
        self._columns = (_ColumnsOfFewRanks if self.world <= FEW_RANKS else _ColumnsOfManyRanks)(table)

    @classmethod
    def from_ranks(cls, ranks: Sequence[RankStats], *updates: Update | None) -> GatheredStats:
        """The statistics of these ranks, as if they had exchanged them."""
        rows = [[stats.to_row(torch.device("cpu"))] for stats in ranks]
        return cls(torch.tensor(rows, dtype=torch.float64).view(len(rows), 1, NUM_STATS), *updates)

    @cached_property
    def stages_ms(self) -> StageTimes:
        """Milliseconds per rank and stage."""
        return self._columns.get_rows(STAGE_COLUMNS)

    @property
    def count(self) -> float:
        return self._columns.sum(COUNT)

    @property
    def stop(self) -> StopLevel:
        return StopLevel(int(self._columns.max(STOP)))

    @property
    def save(self) -> bool:
        return self._columns.max(SAVE) > 0

    def check_call_order(self) -> None:
        """Check that all ranks called the parts of a sharded model in the same order.

        Raises:
            TrainingFailed: they did not, so the collectives of this update exchanged tensors of different parts.
        """
        if self._columns.min(CALL_ORDER) != self._columns.max(CALL_ORDER):
            raise TrainingFailed(
                "in this update the ranks called different parts of the model, or in another order (as with random "
                "layer drop), so that their gradients cannot be summed: let every rank call all parts in the same "
                "order, or type strategy=ddp, with strategy.find_unused_parameters=true where parts are left out"
            )

    @property
    def loss(self) -> float:
        """Summed loss of the previous update, over all ranks."""
        return self._columns.sum(LOSS)

    @property
    def loss_count(self) -> float:
        """Loss count (samples or tokens) of the previous update, over all ranks."""
        return self._columns.sum(LOSS_COUNT)

    @property
    def grad_norm(self) -> float:
        """Norm of the previous update's mean gradient; rank 0's value, so that all ranks use the same bits."""
        return self._columns.get(GRAD_NORM)[0]

    @property
    def group_sq_norm_sum(self) -> float:
        """Sum over the groups of the previous update: squared norm of the group's gradient over its loss count."""
        return self._columns.sum(GROUP_SQ_NORM_SUM)

    @property
    def groups(self) -> int:
        """Number of groups of the previous update's batch whose gradient norms were measured separately."""
        return int(self._columns.sum(GROUPS))

    @property
    def not_finite(self) -> tuple[int, ...]:
        """The ranks whose own loss of the previous update was NaN or infinite."""
        if math.isfinite(self.loss):
            return ()
        return tuple(rank for rank, loss in enumerate(self._columns.get(LOSS)) if not math.isfinite(loss))

    @property
    def finite(self) -> bool:
        """Whether the previous update was applied."""
        return self._columns.min(FINITE) > 0

    @property
    def is_regular(self) -> bool:
        """Whether the previous update counted something, was applied and had a finite loss, as almost every one."""
        return self.loss_count > 0 and self.finite and math.isfinite(self.loss)


class _ColumnsOfFewRanks:
    """The table by columns, for so few ranks that tensor operations would take longer than loops.

    Nothing is computed before it is asked for: rows that are written later, many at a time, cost less then.
    """

    def __init__(self, table: torch.Tensor) -> None:
        self._table: list[list[list[float]]] = table.tolist()

    def get(self, column: int) -> list[float]:
        return [sum([word[column] for word in words]) for words in self._table]

    def get_rows(self, columns: slice) -> StageTimes:
        parts = [[word[columns] for word in words] for words in self._table]
        return [[sum(numbers) for numbers in zip(*words, strict=True)] for words in parts]

    def sum(self, column: int) -> float:
        values = self.get(column)
        return values[0] + values[1] if len(values) == 2 else float(compute_tree_sum(values))

    def min(self, column: int) -> float:
        return min(self.get(column))

    def max(self, column: int) -> float:
        return max(self.get(column))


class _ColumnsOfManyRanks:
    """The table by columns: all sums and extremes at once, as tensors."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table.sum(dim=1)
        least, largest = torch.aminmax(self._table, dim=0)
        self._sums: list[float] = sum_rows_as_tree(self._table).tolist()
        self._least: list[float] = least.tolist()
        self._largest: list[float] = largest.tolist()

    def get(self, column: int) -> list[float]:
        values: list[float] = self._table[:, column].tolist()
        return values

    def get_rows(self, columns: slice) -> StageTimes:
        return self._table[:, columns]

    def sum(self, column: int) -> float:
        return self._sums[column]

    def min(self, column: int) -> float:
        return self._least[column]

    def max(self, column: int) -> float:
        return self._largest[column]


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
        """Return the statistics. On a GPU this waits for their copy only, not for what follows it.

        The wait is in Python, where a signal ends it: it has no end where another rank was lost.
        """
        while self._event is not None and not self._event.query():
            time.sleep(POLL_S)
        return GatheredStats(self._table, *self._updates)
