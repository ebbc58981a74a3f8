"""The table of per-rank statistics that the ranks exchange in every update.

The table has a row for each rank. Each rank fills in its own row, zeros elsewhere, and the sum over the ranks gives all
of them to every rank. Under DDP the table is the gradient of a parameter of the wrapped module, so it travels within
the gradients' own all-reduce, without any message of its own. Other strategies sum it in an all-reduce that runs beside
the backward pass. The result stays on the device: nothing here makes the host wait for it.

A row is a list of numbers on a CPU, and a float64 tensor on another device. A table has the shape (world, words,
fields): a number is the sum of its words.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from launcher.recipe import Loss
from launcher.telemetry.stats_fields import NUM_STATS, StatsRow

__all__ = ["StatsAllReduce", "StatsInBucket"]

ARRAY_CODES = {torch.float32: "f", torch.float64: "d"}


class StatsAllReduce:
    """Sums the table in an asynchronous all-reduce on the default process group. With one worker nothing is sent."""

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self._rank = rank
        self._world = world
        self._device = device
        self._table: torch.Tensor | None = None
        self._work: dist.Work | None = None

    def send(self, row: StatsRow) -> None:
        """Start the sum; `row` is this rank's. Only one sum may be under way."""
        own = torch.as_tensor(row, dtype=torch.float64, device=self._device)
        if self._world == 1:
            self._table = own[None, None]
            return
        self._table = torch.zeros(self._world, 1, len(own), dtype=torch.float64, device=self._device)
        self._table[self._rank, 0] = own
        self._work = dist.all_reduce(self._table, async_op=True)

    def receive(self) -> torch.Tensor:
        """The table, (world, 1, fields) in float64: on a GPU in the order of the stream, without waiting for it."""
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
        self._begin = rank * 2 * NUM_STATS
        self._is_waiting = False  # for its bucket
        # the table as this rank sends it; on a CPU an array has the same memory and costs less to write than a tensor
        self._array: array[float] | None = None
        self._outgoing = torch.zeros_like(self.words)
        if device.type == "cpu" and dtype in ARRAY_CODES:
            self._array = array(ARRAY_CODES[dtype], bytes(self._outgoing.nbytes))
            self._outgoing = torch.frombuffer(self._array, dtype=dtype)
        self._high, self._low = self._outgoing.view(self._shape)[rank]

    def send(self, row: StatsRow) -> None:
        """Take this rank's row; it is written to its bucket when that is complete."""
        self._split(row)
        self._is_waiting = True

    def round(self, row: StatsRow) -> StatsRow:
        """The row as it would arrive: for an exchange of other kind that must have the same bits."""
        self._split(row)
        return self._high.double() + self._low.double()

    def _split(self, row: StatsRow) -> None:
        if self._array is not None and not isinstance(row, torch.Tensor):
            self._array[self._begin : self._begin + 2 * NUM_STATS] = split_into_words(row, self._array.typecode)
            return
        exact = torch.as_tensor(row, dtype=torch.float64, device=self._high.device)
        self._high.copy_(exact)
        self._low.copy_(exact - self._high)
        self._low.nan_to_num_(nan=0.0)  # infinity minus infinity: the words are then infinity and 0

    def add_to_graph(self, loss: Loss) -> Loss:
        """The same loss, whose backward pass also reaches the parameter, so that its bucket becomes complete."""
        return Loss(torch.add(loss.total, self.words[0], alpha=0), loss.count, loss.metrics)

    def make_gradient(self, *, late: bool) -> torch.Tensor:
        """The parameter's gradient, for a backward pass that starts from it too: shorter than a way through a graph.

        It is the table as this rank sends it, or zeros if that is written `late`, once its bucket is complete.
        """
        if late:
            return torch.zeros_like(self.words)
        self._is_waiting = False
        return self._outgoing

    def write(self, bucket: torch.Tensor) -> None:
        """Called before a bucket is summed: write the row if the parameter's gradient is a part of this bucket."""
        gradient = self.words.grad
        if gradient is None or not self._is_waiting:
            return
        if 0 <= gradient.data_ptr() - bucket.data_ptr() < bucket.nbytes:
            gradient.copy_(self._outgoing)
            self._is_waiting = False

    def receive(self) -> torch.Tensor:
        """The table, (world, 2, fields) in float64, after the backward pass has summed all buckets."""
        gradient = self.words.grad
        assert gradient is not None, "the backward pass did not reach the parameter of the statistics"
        assert not self._is_waiting, "no bucket held the gradient of the statistics"
        self.words.grad = None
        return gradient.to(torch.float64, copy=True).view(self._shape)


def split_into_words(row: Sequence[float], typecode: str) -> array[float]:
    """Each number rounded, then what that left of each; 0 where that is no number, as for infinity."""
    high = array(typecode, row)
    left = [number - rounded for number, rounded in zip(row, high, strict=True)]
    return high + array(typecode, [value if math.isfinite(value) else 0.0 for value in left])
