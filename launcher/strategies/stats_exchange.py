"""The table of per-rank statistics that the ranks exchange in every update.

The table has a row for each rank. Each rank fills in its own row, zeros elsewhere, and the sum over the ranks gives all
of them to every rank. Under DDP the table is the gradient of a parameter of the wrapped module, so it travels within
the gradients' own all-reduce, without any message of its own. Other strategies sum it in an all-reduce that runs beside
the backward pass. The result stays on the device: nothing here makes the host wait for it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from launcher.recipe import Loss
from launcher.telemetry.stats_fields import NUM_STATS

__all__ = ["StatsAllReduce", "StatsInBucket"]


class StatsAllReduce:
    """Sums the table in an asynchronous all-reduce on the default process group. With one worker nothing is sent."""

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self._rank = rank
        self._world = world
        self._device = device
        self._table: torch.Tensor | None = None
        self._work: dist.Work | None = None

    def send(self, row: torch.Tensor) -> None:
        """Start the sum; `row` is this rank's, float64 on the device. Only one sum may be under way."""
        if self._world == 1:
            self._table = row[None]
            return
        self._table = torch.zeros(self._world, len(row), dtype=torch.float64, device=self._device)
        self._table[self._rank] = row
        self._work = dist.all_reduce(self._table, async_op=True)

    def receive(self) -> torch.Tensor:
        """The table, (world, fields) in float64: on a GPU in the order of the stream, without waiting for it."""
        table, work = self._table, self._work
        self._table = self._work = None
        assert table is not None
        if work is not None:
            work.wait()
        return table


class StatsInBucket:
    """The table as the gradient of a parameter, which DDP puts into one of its buckets and sums with the others.

    A number is the sum of two words in `dtype`, that of the gradients: one float32 alone would round it.
    """

    def __init__(self, rank: int, world: int, device: torch.device, dtype: torch.dtype) -> None:
        self.words = nn.Parameter(torch.zeros(world * 2 * NUM_STATS, dtype=dtype, device=device))
        self._shape = (world, 2, NUM_STATS)
        self._rank = rank
        self._row = torch.zeros(2, NUM_STATS, dtype=dtype, device=device)
        self._high, self._low = self._row
        self._is_waiting = False  # for its bucket

    def send(self, row: torch.Tensor) -> None:
        """Take this rank's row, float64 on the device; it is written when its bucket is complete."""
        self._split(row)
        self._is_waiting = True

    def round(self, row: torch.Tensor) -> torch.Tensor:
        """The row as it would arrive: for an exchange of other kind that must have the same bits."""
        self._split(row)
        return self._row.sum(dim=0, dtype=torch.float64)

    def _split(self, row: torch.Tensor) -> None:
        self._high.copy_(row)
        self._low.copy_(row - self._high)
        self._low.nan_to_num_(nan=0.0)  # infinity minus infinity: the words are then infinity and 0

    def add_to_graph(self, loss: Loss) -> Loss:
        """The same loss, whose backward pass also reaches the parameter, so that its bucket becomes complete."""
        return Loss(torch.add(loss.total, self.words[0], alpha=0), loss.count, loss.metrics)

    def write(self, bucket: torch.Tensor) -> None:
        """Called before a bucket is summed: write the row if the parameter's gradient is a part of this bucket."""
        gradient = self.words.grad
        if gradient is None or not self._is_waiting:
            return
        if 0 <= gradient.data_ptr() - bucket.data_ptr() < bucket.numel() * bucket.element_size():
            gradient.zero_()
            gradient.view(self._shape)[self._rank] = self._row
            self._is_waiting = False

    def receive(self) -> torch.Tensor:
        """The table, (world, fields) in float64, after the backward pass has summed all buckets."""
        gradient = self.words.grad
        assert gradient is not None, "the backward pass did not reach the parameter of the statistics"
        assert not self._is_waiting, "no bucket held the gradient of the statistics"
        table = gradient.view(self._shape).sum(dim=1, dtype=torch.float64)
        self.words.grad = None
        return table
