"""The search over sizes: which are tried, how often, and when to stop. Every rank makes the same decisions."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from launcher.distributed.store_gather import StoreGather
from launcher.goodput.throughput_model import label
from launcher.system.atomic_files import atomic_write_text
from launcher.tune.measurements import Measurement, Measurements
from launcher.tune.oom import predict_bytes
from launcher.tune.operators import OperatorGrowth, OperatorProfile
from launcher.tune.probe import ProbeContext, TimingSpec, measure_size
from launcher.tune.profiling import profile_operators
from launcher.tune.size_search import (
    INITIAL_SIZE,
    choose_initial_size,
    choose_next_size,
    iter_intermediate_sizes,
    next_size_up,
    sizes_around_knee,
)

__all__ = ["SizeSearch", "TimeBudget"]

MAX_REPEAT_ROUNDS = 10
GROWTH_BUDGET_SHARE, BISECTION_BUDGET_SHARE = (
    0.5,
    0.75,
)  # shares of the search budget at which growing, and finding the largest size, stop
MIN_BLOCKS_PER_BUDGET = 400  # a block takes at most 1/400 of the search budget
SYNTHETIC_BUDGET_SHARE = 0.2  # share of the search budget, added to it, for synthetic data


@dataclass(frozen=True)
class TimeBudget:
    """Time budget in seconds, as measured on rank 0. `spent_s`: used by earlier attempts."""

    budget_s: float
    store_gather: StoreGather
    spent_s: float = 0.0
    clock: Callable[[], float] = time.monotonic
    began: float = field(default_factory=time.monotonic)

    def used_s(self) -> float:
        return self.spent_s + self.clock() - self.began

    def make_part(self, share: float) -> TimeBudget:
        """A new budget of `share` of this one, starting now."""
        return TimeBudget(share * self.budget_s, self.store_gather, clock=self.clock, began=self.clock())

    def is_used_up(self, share: float = 1.0) -> bool:
        return bool(self.store_gather.broadcast_from_rank0(self.used_s() >= share * self.budget_s))


class SizeSearch:
    """The search on one rank; its measurements are the same on all ranks.

    `make` builds the replica; it is rebuilt after running out of memory, as the old one may be in an undefined state.
    `state`: a file of rank 0 to continue from if the workers are restarted.
    """

    def __init__(
        self,
        make: Callable[[], ProbeContext],
        items: Any,
        largest: int,
        allowed_bytes: float | None,
        budget: TimeBudget,
        measurements: Measurements | None = None,
        state: Path | None = None,
    ) -> None:
        self.measurements = measurements or Measurements()
        self._make = make
        self._stand: ProbeContext | None = None
        self._items = items
        self._largest = largest
        self._allowed = allowed_bytes
        self._term = budget
        self._state = state
        self._pace = TimingSpec(block_s=min(TimingSpec().block_s, budget.budget_s / MIN_BLOCKS_PER_BUDGET))

    def measure_sizes(self, sizes: Sequence[int]) -> None:
        """Measure exactly these sizes, ascending, so that smaller ones predict the memory of larger ones."""
        self.measurements = replace(self.measurements, only=tuple(sorted(set(sizes))))
        for size in self.measurements.only or ():
            self._time_size(size)
        self._repeat_uncertain_sizes()

    def search(self) -> None:
        """Grow from a small size, find the largest working size, then refine around the knee."""
        self._grow_size()
        self._find_largest_size()
        advice = self.measurements.make_advice()
        if advice is not None:
            known = [one.size for one in self.measurements.sizes() if one.speeds]
            failed = [one.size for one in self.measurements.sizes() if not one.fits_comfortably]
            for size in sizes_around_knee(advice.knee, known, failed, self._largest):
                if self._term.is_used_up():
                    break
                self._time_size(size)
        self._repeat_uncertain_sizes()

    def measure_synthetic(self, sizes: Sequence[int], synthetic: Any) -> None:
        """Measure the sizes on synthetic data of the same shape, which costs nothing to read."""
        for size in sizes:
            if self.measurements.synthetic and self._term.is_used_up(1 + SYNTHETIC_BUDGET_SHARE):
                break
            stood_in = measure_size(self._get_context(), size, synthetic, self._pace, self._allowed)
            self.measurements = replace(self.measurements, synthetic=(*self.measurements.synthetic, stood_in))

    def begin_followups(self) -> None:
        """Start the follow-ups: if a rank is lost in them, the results so far are final."""
        self.measurements = replace(self.measurements, closing=True)
        self._write_state(None)

    def measure_split(self, size: int, accumulation: int) -> None:
        """Measure the batch as `accumulation` micro-batches of `size`, unless memory ran out at that split before."""
        if any(one.size == size and not one.fits for one in self.measurements.splits):
            return
        found = measure_size(self._get_context(), size, self._items, self._pace, self._allowed, accumulation)
        if not found.fits:
            self._release_context()
        self.measurements = replace(self.measurements, splits=(*self.measurements.splits, found))

    def profile_size(self, size: int, stage: str) -> OperatorProfile | None:
        """Profile the operators of one stage at a size; None if memory ran out."""
        found = profile_operators(self._get_context(), size, self._items, stage)
        if found is None:
            self._release_context()
        return found

    def record_operators(self, operators: tuple[OperatorGrowth, ...]) -> None:
        self.measurements = replace(self.measurements, operators=operators)

    def _grow_size(self) -> None:
        size: int | None = choose_initial_size(self._largest)
        while size is not None:
            if not self._time_size(size):
                size = None if self.measurements.largest_working() else choose_next_size(0, size, self._largest)
                continue
            if self._has_regressed(size):
                return
            if self._term.is_used_up(GROWTH_BUDGET_SHARE):
                if size < self._largest:
                    self._add_note(f"no size above {size} was timed: this part of tune.budget_s was used up")
                return
            size = next_size_up(size, self._largest)

    def _has_regressed(self, size: int) -> bool:
        points = [point for point in self.measurements.points() if point.samples_per_s]
        return label(points)[size] == "regressed"

    def _find_largest_size(self) -> None:
        """Find the exact largest working size by trying; memory prediction only excludes sizes."""
        while self.measurements.largest_working():
            size = choose_next_size(
                self.measurements.largest_working(), self.measurements.smallest_failing(), self._largest
            )
            if size is None:
                return
            if self._term.is_used_up(BISECTION_BUDGET_SHARE):
                works = self.measurements.largest_working()
                note = f"memory_max={works} is only the largest tried size that works"
                self._add_note(f"{note}: this part of tune.budget_s was used up")
                return
            self._try_size(size, None)

    def _repeat_uncertain_sizes(self) -> None:
        """Measure uncertain sizes again, in alternating order, so that drift favours no size."""
        for turn in range(MAX_REPEAT_ROUNDS):
            loose = [one.size for one in self.measurements.sizes() if one.fits and one.speeds and one.is_uncertain]
            if not loose:
                return
            for size in loose if turn % 2 else reversed(loose):
                if self._term.is_used_up():
                    return
                self._time_size(size)

    def _time_size(self, size: int) -> bool:
        """Time a size; return whether it fits. On a CPU, intermediate sizes are tried first for their memory."""
        known = self.measurements.largest_working()
        if self._allowed is not None:
            for stone in (
                iter_intermediate_sizes(known or INITIAL_SIZE, size)
                if self.measurements.find_size(size) is None
                else ()
            ):
                if stone > known and not self._try_size(stone, None):
                    break
        return self._try_size(size, self._pace)

    def _try_size(self, size: int, pace: TimingSpec | None) -> bool:
        seen = self.measurements.find_size(size)
        if seen is not None and not seen.fits:
            return False
        if self._is_too_large(size):
            found = Measurement(size, where="foreseen", predicted=True)
        else:
            self._write_state(size)
            found = measure_size(self._get_context(), size, self._items, pace, self._allowed)
        if not found.fits:
            self._release_context()
        self.measurements = self.measurements.with_measurement(replace(found, timing=pace is not None))
        self._write_state(None)
        return found.fits

    def _is_too_large(self, size: int) -> bool:
        """Whether a size is predicted not to fit on a CPU, where the kernel kills instead of refusing memory."""
        if self._allowed is None:
            return False
        foreseen = predict_bytes(size, self.measurements.memory_by_size())
        return foreseen is not None and foreseen > self._allowed

    def _get_context(self) -> ProbeContext:
        if self._stand is None:
            self._stand = self._make()
        return self._stand

    def _release_context(self) -> None:
        self._stand = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _add_note(self, text: str) -> None:
        self.measurements = self.measurements.with_note(text)

    def _write_state(self, trying: int | None) -> None:
        if self._state is not None:
            facts = {"ledger": self.measurements.to_facts(), "trying": trying, "spent_s": self._term.used_s()}
            atomic_write_text(self._state, json.dumps(facts))
