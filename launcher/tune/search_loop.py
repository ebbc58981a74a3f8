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
    choose_next_size_up,
    choose_sizes_around_knee,
    iter_intermediate_sizes,
)

__all__ = ["SizeSearch", "TimeBudget"]

MAX_REPEAT_ROUNDS = 10
GROWTH_BUDGET_SHARE = 0.5  # share of the search budget at which growing stops
BISECTION_BUDGET_SHARE = 0.75  # share of the search budget at which the search for the largest size stops
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

    `make_context` builds the replica; it is rebuilt after running out of memory, as the old one may be in an undefined
    state. `state_file`: a file of rank 0 to continue from if the workers are restarted.
    """

    def __init__(
        self,
        make_context: Callable[[], ProbeContext],
        items: Any,
        largest: int,
        allowed_bytes: float | None,
        budget: TimeBudget,
        measurements: Measurements | None = None,
        state_file: Path | None = None,
    ) -> None:
        self.measurements = measurements or Measurements()
        self._make_context = make_context
        self._context: ProbeContext | None = None
        self._items = items
        self._largest = largest
        self._allowed_bytes = allowed_bytes
        self._budget = budget
        self._state_file = state_file
        self._timing = TimingSpec(block_s=min(TimingSpec().block_s, budget.budget_s / MIN_BLOCKS_PER_BUDGET))

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
            timed = [result.size for result in self.measurements.sizes() if result.speeds]
            failed = [result.size for result in self.measurements.sizes() if not result.fits_comfortably]
            for size in choose_sizes_around_knee(advice.knee, timed, failed, self._largest):
                if self._budget.is_used_up():
                    break
                self._time_size(size)
        self._repeat_uncertain_sizes()

    def measure_synthetic(self, sizes: Sequence[int], synthetic: Any) -> None:
        """Measure the sizes on synthetic data of the same shape, which costs nothing to read."""
        for size in sizes:
            if self.measurements.synthetic and self._budget.is_used_up(1 + SYNTHETIC_BUDGET_SHARE):
                break
            measurement = measure_size(self._get_context(), size, synthetic, self._timing, self._allowed_bytes)
            self.measurements = replace(self.measurements, synthetic=(*self.measurements.synthetic, measurement))

    def begin_followups(self) -> None:
        """Start the follow-ups: if a rank is lost in them, the results so far are final."""
        self.measurements = replace(self.measurements, closing=True)
        self._write_state(None)

    def measure_split(self, size: int, accumulation: int) -> None:
        """Measure the batch as `accumulation` micro-batches of `size`, unless memory ran out at that split before."""
        if any(split.size == size and not split.fits for split in self.measurements.splits):
            return
        measurement = measure_size(
            self._get_context(), size, self._items, self._timing, self._allowed_bytes, accumulation
        )
        if not measurement.fits:
            self._release_context()
        self.measurements = replace(self.measurements, splits=(*self.measurements.splits, measurement))

    def profile_size(self, size: int, stage: str) -> OperatorProfile | None:
        """Profile the operators of one stage at a size; None if memory ran out."""
        profile = profile_operators(self._get_context(), size, self._items, stage)
        if profile is None:
            self._release_context()
        return profile

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
            if self._budget.is_used_up(GROWTH_BUDGET_SHARE):
                if size < self._largest:
                    self._add_note(f"no size above {size} was timed: this part of tune.budget_s was used up")
                return
            size = choose_next_size_up(size, self._largest)

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
            if self._budget.is_used_up(BISECTION_BUDGET_SHARE):
                works = self.measurements.largest_working()
                note = f"memory_max={works} is only the largest tried size that works"
                self._add_note(f"{note}: this part of tune.budget_s was used up")
                return
            self._try_size(size, None)

    def _repeat_uncertain_sizes(self) -> None:
        """Measure uncertain sizes again, in alternating order, so that drift favours no size."""
        for turn in range(MAX_REPEAT_ROUNDS):
            results = self.measurements.sizes()
            uncertain = [result.size for result in results if result.fits and result.speeds and result.is_uncertain]
            if not uncertain:
                return
            for size in uncertain if turn % 2 else reversed(uncertain):
                if self._budget.is_used_up():
                    return
                self._time_size(size)

    def _time_size(self, size: int) -> bool:
        """Time a size; return whether it fits. On a CPU, intermediate sizes are tried first for their memory."""
        largest_working = self.measurements.largest_working()
        if self._allowed_bytes is not None and self.measurements.find_size(size) is None:
            for intermediate in iter_intermediate_sizes(largest_working or INITIAL_SIZE, size):
                if intermediate > largest_working and not self._try_size(intermediate, None):
                    break
        return self._try_size(size, self._timing)

    def _try_size(self, size: int, timing: TimingSpec | None) -> bool:
        """Measure a size unless it is known or predicted not to fit; return whether it fits."""
        result = self.measurements.find_size(size)
        if result is not None and not result.fits:
            return False
        if self._is_too_large(size):
            measurement = Measurement(size, where="foreseen", predicted=True)
        else:
            self._write_state(size)
            measurement = measure_size(self._get_context(), size, self._items, timing, self._allowed_bytes)
        if not measurement.fits:
            self._release_context()
        self.measurements = self.measurements.with_measurement(replace(measurement, timing=timing is not None))
        self._write_state(None)
        return measurement.fits

    def _is_too_large(self, size: int) -> bool:
        """Whether a size is predicted not to fit on a CPU, where the kernel kills instead of refusing memory."""
        if self._allowed_bytes is None:
            return False
        predicted = predict_bytes(size, self.measurements.memory_by_size())
        return predicted is not None and predicted > self._allowed_bytes

    def _get_context(self) -> ProbeContext:
        if self._context is None:
            self._context = self._make_context()
        return self._context

    def _release_context(self) -> None:
        self._context = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _add_note(self, text: str) -> None:
        self.measurements = self.measurements.with_note(text)

    def _write_state(self, trying: int | None) -> None:
        if self._state_file is not None:
            facts = {"measurements": self.measurements.to_facts(), "trying": trying, "spent_s": self._budget.used_s()}
            atomic_write_text(self._state_file, json.dumps(facts))
