"""Follow-up measurements of tune, without measuring: their order and their budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from launcher.distributed.store_gather import StoreGather
from launcher.tune.followup import run_followups
from launcher.tune.measurements import Measurement, Measurements
from launcher.tune.operators import OperatorGrowth, OperatorProfile
from launcher.tune.processes.retries import mark_oom
from launcher.tune.search_loop import TimeBudget
from tests.helpers.measured_sizes import measured_size_with_sync

# --- order of measurements, and the budget ------------------------------------------------------------------------


class FakeSearch:
    """A fake search in which every measurement takes a second."""

    def __init__(self, measurements: Measurements, speed: Callable[[int], Measurement]) -> None:
        self.measurements = measurements
        self.now_s = 0.0
        self.log: list[str] = []
        self._speed = speed

    def begin_followups(self) -> None:
        self.measurements = replace(self.measurements, closing=True)

    def measure_split(self, size: int, accumulation: int) -> None:
        self.now_s += 1
        self.log.append(f"{size}x{accumulation}")
        self.measurements = replace(self.measurements, splits=(*self.measurements.splits, self._speed(size)))

    def profile_size(self, size: int, stage: str) -> OperatorProfile | None:
        self.now_s += 1
        self.log.append(f"{stage} of {size}")
        return OperatorProfile(size, {"aten::mm": float(size)})

    def record_operators(self, operators: tuple[OperatorGrowth, ...]) -> None:
        self.measurements = replace(self.measurements, operators=operators)


def run_search(
    measurements: Measurements,
    budget_s: float,
    speed: Callable[[int], Measurement] = lambda size: measured_size_with_sync(size, 9000.0),
) -> FakeSearch:
    search = FakeSearch(measurements, speed)
    gather: Any = StoreGather(None, 0, 1)  # type: ignore[arg-type]
    # the search has already used its own budget
    run_followups(search, TimeBudget(budget_s, gather, clock=lambda: search.now_s, began=-budget_s), 1)  # type: ignore[arg-type]
    return search


def test_splits_are_timed_in_alternating_order() -> None:
    search = run_search(Measurements((measured_size_with_sync(16, 9000.0),)), budget_s=1000)
    assert search.log == ["4x4", "8x2", "16x1", "16x1", "8x2", "4x4"]
    assert search.measurements.closing


def test_uncertain_splits_are_repeated_at_most_four_rounds() -> None:
    search = run_search(
        Measurements((measured_size_with_sync(16, 9000.0),)),
        1000,
        lambda size: measured_size_with_sync(size, 9000.0, 0.3),
    )
    assert len(search.log) == 12


def test_followups_stop_when_their_budget_ends() -> None:
    assert run_search(Measurements((measured_size_with_sync(16, 9000.0),)), budget_s=10).log == ["4x4", "8x2"]


def test_followup_exceeding_budget_is_not_started() -> None:
    """An update of 320 ms: three measurements of seven are 6.7 s; one of them and one of the slower size are 9 s."""
    slow = Measurements((measured_size_with_sync(16, 100.0), measured_size_with_sync(32, 66.0)))
    assert run_search(slow, budget_s=40).log == []
    assert run_search(slow, budget_s=50).log == ["4x4", "8x2", "16x1", "16x1", "8x2", "4x4"]


def test_regression_profiles_both_sizes() -> None:
    measurements = Measurements((measured_size_with_sync(16, 9000.0), measured_size_with_sync(32, 6000.0)))
    search = run_search(measurements, budget_s=1000)
    assert search.log[:3] == ["forward of 16", "forward of 32", "4x4"]
    assert search.measurements.operators == (OperatorGrowth("aten::mm", "forward", 16, 32, 16.0, 32.0),)
    short = run_search(measurements, budget_s=5)
    assert short.measurements.operators == ()
    assert short.log == ["forward of 16", "4x4"], "a budget of its own for each"


def test_oom_in_followup_keeps_earlier_results() -> None:
    before = Measurements(
        (measured_size_with_sync(16, 9000.0),),
        closing=True,
        operators=(OperatorGrowth("aten::mm", "forward", 8, 16, 1.0, 2.0),),
    )
    facts = {"measurements": before.to_facts(), "trying": None, "spent_s": 3.0}
    assert Measurements.from_facts(mark_oom(facts)["measurements"]) == before
    split = replace(before, splits=(measured_size_with_sync(8, 9000.0, accumulation=2),))
    assert Measurements.from_facts(split.to_facts()) == split
