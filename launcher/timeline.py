"""Every update of a run, from its first sample to its last, as a pure function of the position.

Loader and loop walk the same timeline, so they agree without talking, and a position is all that a restart needs.
Places are counted over the whole run: place p is place p % size of epoch p // size. What sample stands there is the
order's affair.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

from launcher.batch import BatchPlan

__all__ = ["MicroBatch", "Position", "Span", "Timeline", "Update"]

Span = tuple[int, int, int]  # (epoch, start, stop): places start ... stop - 1 of the epoch's order


@dataclass(frozen=True)
class Position:
    """Where training stands: samples seen, and finished updates. Never what is merely prefetched."""

    samples: int = 0
    update: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes, as spans of places in the epochs' orders.

    A `pad` stands for a rank without samples: one sample of the update, that counts for nothing. `place` (the rank, or
    the shard) and `index` are its address within the update, which its generators are seeded by.
    """

    spans: tuple[Span, ...]
    pad: bool = False
    place: int = 0
    index: int = 0

    @property
    def size(self) -> int:
        """Samples in the forward pass."""
        return sum(stop - start for _, start, stop in self.spans)


@dataclass(frozen=True)
class Update:
    """One update: places `start` ... `end` - 1 of the run.

    `index` counts the updates before it. `nominal` is the plan in force, `plan` what this update takes: the same, or a
    part of it where the epoch or the run ends. `size` is that of the data set. `even`: every rank makes as many
    micro-batches as the one that makes the most.
    """

    index: int
    start: int
    nominal: BatchPlan
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
    def tail(self) -> bool:
        """Whether it is cut: no change of batch, and no figure of speed or noise should count it."""
        return self.samples < self.nominal.global_batch

    @property
    def epoch(self) -> int:
        """The epoch of its first sample, from 0."""
        return self.start // self.size

    @property
    def after(self) -> Position:
        """Where training stands once it is finished."""
        return Position(self.end, self.index + 1)

    def micro_batches(self, rank: int) -> tuple[MicroBatch, ...]:
        """The rank's micro-batches in order, then its pads: one for a rank without samples, more where all are even.

        The ranks' slices of the window follow one another by rank, so their concatenation is the window.
        """
        first = self.start + sum(self.plan.shares[:rank])
        sizes = self.plan.micro_batches(rank)
        cuts = zip(pairwise(accumulate(sizes, initial=first)), self.plan.addresses(rank), strict=True)
        own = tuple(MicroBatch(self._spans(*ends), place=place, index=index) for ends, (place, index) in cuts)
        pads = range(len(own), max(1, self._most if self.even else 0))
        sample = self._spans(self.start, self.start + 1)
        return own + tuple(MicroBatch(sample, pad=True, place=rank, index=index) for index in pads)

    @cached_property
    def _most(self) -> int:
        return max(len(self.plan.micro_batches(rank)) for rank in range(self.plan.world))

    def _spans(self, start: int, stop: int) -> tuple[Span, ...]:
        spans = []
        while start < stop:
            epoch, offset = divmod(start, self.size)
            taken = min(stop - start, self.size - offset)
            spans.append((epoch, offset, offset + taken))
            start += taken
        return tuple(spans)


@dataclass(frozen=True)
class Timeline:
    """The updates of a run of `duration` samples over a data set of `size`.

    `stages` are (from this sample on, plan), the first from 0, ascending; usually one, several for a batch ramp. A
    stage takes effect at the first update that starts there or later. Under `tail="flush"` an epoch's last update is
    cut to what is left of the epoch, under "carry" it goes on into the next. The run's last is cut to the duration.
    `even` is handed to each update.
    """

    size: int
    duration: int
    stages: tuple[tuple[int, BatchPlan], ...]
    tail: Literal["flush", "carry"] = "flush"
    even: bool = False

    def __post_init__(self) -> None:
        begins = [begin for begin, _ in self.stages]
        if self.size < 1 or self.duration < 0:
            raise ValueError(f"no timeline of {self.duration} samples over a data set of {self.size}")
        if begins[:1] != [0] or any(later <= begin for begin, later in pairwise(begins)):
            raise ValueError(f"stages must ascend from 0, not begin at {begins}")
        if self.tail not in ("flush", "carry"):
            raise ValueError(f"a tail of {self.tail!r} is neither flush nor carry")

    def updates(self, position: Position = Position()) -> Iterator[Update]:
        """Every update from `position` to the end of the run, none where that is reached."""
        begins = [begin for begin, _ in self.stages]
        start, index = position.samples, position.update
        while start < self.duration:
            nominal = self.stages[bisect.bisect_right(begins, start) - 1][1]
            samples = min(nominal.global_batch, self._room(start))
            yield Update(index, start, nominal, nominal.part(samples), self.size, self.even)
            start, index = start + samples, index + 1

    def _room(self, start: int) -> int:
        """The most samples that an update from `start` on may take."""
        left = self.duration - start
        return min(left, self.size - start % self.size) if self.tail == "flush" else left

    def count(self, position: Position = Position()) -> int:
        """How many updates `updates(position)` has; in time proportional to the number of stages."""
        start, total = position.samples, 0
        for begin, end, batch in self._stretches():
            if begin <= start < end:
                updates, start = self._run_through(start, end, batch)
                total += updates
        return total

    def _stretches(self) -> Iterator[tuple[int, int, int]]:
        """(first sample, end, global batch) of each stage."""
        ends = [begin for begin, _ in self.stages[1:]] + [self.duration]
        for (begin, plan), end in zip(self.stages, ends, strict=True):
            yield begin, min(end, self.duration), plan.global_batch

    def _run_through(self, start: int, end: int, batch: int) -> tuple[int, int]:
        """How many updates of `batch` start in start ... end - 1, and where the next one starts."""
        if self.tail == "carry":
            updates = -(-(end - start) // batch)
            return updates, start + updates * batch
        first, begun = self._within_epoch(start, end, batch)
        epochs = max(0, end - begun) // self.size
        last, after = self._within_epoch(begun + epochs * self.size, end, batch)
        return first + epochs * -(-self.size // batch) + last, after

    def _within_epoch(self, start: int, end: int, batch: int) -> tuple[int, int]:
        """The same up to the end of the epoch of `start`."""
        epoch_end = start + self.size - start % self.size
        updates = max(0, -(-(min(end, epoch_end) - start) // batch))
        return updates, min(start + updates * batch, epoch_end)
