"""The sequence of all updates of a run, as a pure function of the position.

The data loader and the training loop iterate over the same timeline, so they agree without communication, and a
restart needs only the position. Sample positions are counted over the whole run: p is position p % size of epoch
p // size. `SamplePermutation` maps it to a sample.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from launcher.plan.batch import BatchPlan

__all__ = ["MicroBatch", "Position", "Span", "Timeline", "Update"]

Span = tuple[int, int, int]  # (epoch, start, stop): positions start ... stop - 1 of the epoch's permutation


@dataclass(frozen=True)
class Position:
    """Training progress: samples seen and updates finished, without samples that are only prefetched."""

    samples: int = 0
    update: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward pass, as spans of positions in the epochs' permutations.

    If `is_padding`, it repeats one sample of the update with weight zero, for a rank without samples. `shard` (the
    rank, or under elastic.exact the shard) and `index` identify it within the update and seed its random generators.
    """

    spans: tuple[Span, ...]
    is_padding: bool = False
    shard: int = 0
    index: int = 0

    @property
    def size(self) -> int:
        """Samples in the forward pass."""
        return sum(stop - start for _, start, stop in self.spans)


@dataclass(frozen=True)
class Update:
    """One update: sample positions `start` ... `end` - 1 of the run.

    `index` is the number of earlier updates. `full_plan` is the plan in effect; `plan` is that of this update, which is
    smaller if the epoch or the run ends. `size` is the size of the data set. `even`: every rank makes as many
    micro-batches as the rank with the most, using padding.
    """

    index: int
    start: int
    full_plan: BatchPlan
    plan: BatchPlan
    size: int
    even: bool = False

    @property
    def samples(self) -> int:
        return self.plan.global_batch

    @property
    def end(self) -> int:
        return self.start + self.samples

    @property
    def is_partial(self) -> bool:
        """Whether the update is a partial batch; it is not a batch change, and speed and noise estimates ignore it."""
        return self.samples < self.full_plan.global_batch

    @property
    def epoch(self) -> int:
        """The epoch of the first sample, counted from 0."""
        return self.start // self.size

    @property
    def next_position(self) -> Position:
        """The position after this update."""
        return Position(self.end, self.index + 1)

    def micro_batches(self, rank: int) -> tuple[MicroBatch, ...]:
        """The rank's micro-batches in order, followed by padding: one for a rank without samples, more if `even`.

        The update's positions are divided into consecutive slices by rank.
        """
        own = tuple(
            MicroBatch(self._make_spans(self.start + start, self.start + stop), shard=shard, index=index)
            for start, stop, shard, index in self.plan.cuts(rank)
        )
        padding = range(len(own), max(1, self.plan.most_micro_batches if self.even else 0))
        if not padding:
            return own
        sample = self._make_spans(self.start, self.start + 1)
        return own + tuple(MicroBatch(sample, is_padding=True, shard=rank, index=index) for index in padding)

    def _make_spans(self, start: int, stop: int) -> tuple[Span, ...]:
        epoch, offset = divmod(start, self.size)
        if offset + stop - start <= self.size:
            return ((epoch, offset, offset + stop - start),)
        spans = []
        while start < stop:
            epoch, offset = divmod(start, self.size)
            taken = min(stop - start, self.size - offset)
            spans.append((epoch, offset, offset + taken))
            start += taken
        return tuple(spans)


@dataclass(frozen=True)
class Timeline:
    """The updates of a run of `duration` samples over a data set of `size` samples.

    `stages` are (start sample, plan), ascending from 0; usually one, several for a batch ramp. A stage takes effect at
    the first update that starts there or later. With `tail="flush"` an epoch's last update is limited to the rest of
    the epoch, with "carry" it continues into the next epoch. The run's last update is limited by the duration. `even`
    is passed to each update.
    """

    size: int
    duration: int
    stages: tuple[tuple[int, BatchPlan], ...]
    tail: Literal["flush", "carry"] = "flush"
    even: bool = False

    def __post_init__(self) -> None:
        begins = [begin for begin, _ in self.stages]
        if self.size < 1 or self.duration < 0:
            raise ValueError(f"invalid timeline: {self.duration} samples over a data set of {self.size}")
        if begins[:1] != [0] or any(later <= begin for begin, later in pairwise(begins)):
            raise ValueError(f"stages must ascend from 0, but begin at {begins}")
        if self.tail not in ("flush", "carry"):
            raise ValueError(f"tail={self.tail!r} is neither flush nor carry")

    def iter_updates(self, position: Position = Position()) -> Iterator[Update]:
        """Every update from `position` to the end of the run; none if the run is complete."""
        begins = [begin for begin, _ in self.stages]
        start, index = position.samples, position.update
        plans: dict[tuple[int, int], BatchPlan] = {}  # making one costs O(world), and most epochs end alike
        while start < self.duration:
            stage = bisect.bisect_right(begins, start) - 1
            nominal = self.stages[stage][1]
            samples = min(nominal.global_batch, self._compute_room(start))
            if (stage, samples) not in plans:
                plans[stage, samples] = nominal.truncated(samples)
            yield Update(index, start, nominal, plans[stage, samples], self.size, self.even)
            start, index = start + samples, index + 1

    def _compute_room(self, start: int) -> int:
        """The largest number of samples that an update starting at `start` may take."""
        left = self.duration - start
        return min(left, self.size - start % self.size) if self.tail == "flush" else left

    def count_updates(self, position: Position = Position()) -> int:
        """The number of updates in `iter_updates(position)`, computed in time proportional to the number of stages."""
        start, total = position.samples, 0
        for begin, end, batch in self._iter_stage_ranges():
            if begin <= start < end:
                updates, start = self._count_updates_in_range(start, end, batch)
                total += updates
        return total

    def _iter_stage_ranges(self) -> Iterator[tuple[int, int, int]]:
        """(first sample, end, global batch) of each stage."""
        ends = [begin for begin, _ in self.stages[1:]] + [self.duration]
        for (begin, plan), end in zip(self.stages, ends, strict=True):
            yield begin, min(end, self.duration), plan.global_batch

    def _count_updates_in_range(self, start: int, end: int, batch: int) -> tuple[int, int]:
        """The number of updates of `batch` that start in start ... end - 1, and the start of the next one."""
        if self.tail == "carry":
            updates = -(-(end - start) // batch)
            return updates, start + updates * batch
        first, begun = self._count_updates_in_epoch(start, end, batch)
        epochs = max(0, end - begun) // self.size
        last, after = self._count_updates_in_epoch(begun + epochs * self.size, end, batch)
        return first + epochs * -(-self.size // batch) + last, after

    def _count_updates_in_epoch(self, start: int, end: int, batch: int) -> tuple[int, int]:
        """As `_count_updates_in_range`, limited to the epoch that contains `start`."""
        epoch_end = start + self.size - start % self.size
        updates = max(0, -(-(min(end, epoch_end) - start) // batch))
        return updates, min(start + updates * batch, epoch_end)
