"""Follow-up measurements of tune, without measuring: splits of a batch, operators that grew, and messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile, record_function

from launcher.distributed.store_gather import StoreGather
from launcher.telemetry.stage_clock import STAGES
from launcher.tune.accumulation import accumulation_splits
from launcher.tune.followup import run_followups
from launcher.tune.measurements import Measurement, Measurements
from launcher.tune.operators import OperatorGrowth, OperatorProfile, choose_stage_to_profile, find_grown_operators
from launcher.tune.processes.retries import mark_oom
from launcher.tune.profiling import PHASE_PREFIX, sum_by_operator
from launcher.tune.report.document import make_tune_document
from launcher.tune.report.html import render_tune_page
from launcher.tune.report.text import describe_slow_operators, describe_splits, format_tune_text
from launcher.tune.search_loop import TimeBudget

FACTS: dict[str, Any] = {
    "recipe": "Mlp", "world": 2, "accumulation": 1, "train_samples": 1437, "device": "cpu (x86_64)",
    "precision": "fp32", "strategy": "ddp", "threads": 1, "loader_workers": 0, "limit_bytes": 10**10,
    "measured": "2026-01-01T00:00:00+00:00", "spent_s": 12.0, "asked": False,
}  # fmt: skip


def visited(size: int, samples_per_s: float, spread: float = 0.002, **more: Any) -> Measurement:
    """The update is 1 ms of sync, and otherwise forward."""
    update_ms = 2e3 * size * more.get("accumulation", 1) / samples_per_s
    stages = dict.fromkeys(STAGES, 0.0) | {"forward": update_ms - 1.0, "sync": 1.0}
    speeds = tuple(samples_per_s * (1 + off) for off in (-spread, 0.0, spread))
    return Measurement(size, speeds, stages, **{"memory_bytes": 10**8, **more})


def split(size: int, accumulation: int, samples_per_s: float, megabytes: int, spread: float = 0.002) -> Measurement:
    return visited(size, samples_per_s, spread, accumulation=accumulation, memory_bytes=megabytes * 10**6)


def found(*splits: Measurement, **more: Any) -> dict[str, Any]:
    return make_tune_document(Measurements((visited(64, 100.0),), splits=splits, **more), FACTS)


# --- splits of one batch ------------------------------------------------------------------------------------------


def test_one_batch_whole_in_halves_and_in_quarters() -> None:
    assert accumulation_splits(64) == ((64, 1), (32, 2), (16, 4))
    assert accumulation_splits(64, accumulation=3) == ((64, 3), (32, 6), (16, 12))


def test_an_odd_size_gives_way_to_one_near_that_can_be_divided() -> None:
    assert accumulation_splits(45) == ((44, 1), (22, 2), (11, 4))
    assert accumulation_splits(23) == ((22, 1), (11, 2))
    assert accumulation_splits(6) == ((6, 1), (3, 2))
    assert accumulation_splits(7) == ()


def test_no_micro_batch_is_of_one_sample() -> None:
    assert accumulation_splits(4) == ((4, 1), (2, 2))
    assert [accumulation_splits(size) for size in (1, 2, 3)] == [(), (), ()]


@given(st.integers(1, 10_000), st.integers(1, 8))
def test_every_way_is_the_same_batch_and_near_the_size(size: int, accumulation: int) -> None:
    batches = {micro * steps for micro, steps in accumulation_splits(size, accumulation)}
    assert len(batches) <= 1
    assert all(7 / 8 * size * accumulation <= batch <= size * accumulation for batch in batches)


def test_splits_are_told_with_their_interval_memory_and_sync() -> None:
    rows = found(split(16, 4, 80.0, 75), split(64, 1, 100.0, 100), split(64, 1, 100.0, 120))["splits"]
    assert [(row["per_device"], row["accumulation"]) for row in rows] == [(64, 1), (16, 4)]
    whole = rows[0]
    assert whole["samples_per_s"] == pytest.approx(100, rel=0.01)
    assert whole["low"] < whole["samples_per_s"] < whole["high"]
    assert whole["sync_ms"] == pytest.approx(1.0)
    assert whole["memory_bytes"] == 100 * 10**6  # left over from an earlier measurement


def test_the_fastest_is_said_and_what_the_others_save_and_cost() -> None:
    splits = (split(64, 1, 100.0, 100), split(32, 2, 94.3, 82), split(16, 4, 40.0, 100))
    assert describe_splits(found(*splits)) == (
        "one batch of 2 x 64 split as 64 x 1, 32 x 2, 16 x 4: 64 x 1 is the fastest, "
        "32 x 2 takes 18 % less memory and 6 % more time, 16 x 4 takes the same memory and 2.5 times the time"
    )


def test_what_cannot_be_told_apart_is_not_called_slower() -> None:
    said = describe_splits(found(split(64, 1, 100.0, 100, 0.05), split(32, 2, 99.0, 80, 0.05)))
    assert said.endswith("32 x 2 takes 20 % less memory and the same time within measurement error")


def test_a_split_that_runs_out_of_memory_is_told_and_is_no_error() -> None:
    lost = Measurement(64, where="forward", accumulation=1)
    told = found(lost, split(32, 2, 90.0, 80))
    assert told["splits"][0] | {"samples_per_s": None, "memory_bytes": None, "sync_ms": None} == told["splits"][0]
    assert describe_splits(told).endswith("32 x 2 is the fastest, 64 x 1 runs out of memory")
    assert "64 x 1  out of memory (in forward)" in format_tune_text(told)
    assert "out of memory (forward)" in render_tune_page(told)


def test_one_way_alone_compares_nothing() -> None:
    told = found(split(16, 4, 80.0, 75))
    assert told["splits"] == []
    assert describe_splits(told) == ""
    assert "one batch as" not in format_tune_text(told)


def test_text_and_page_show_the_splits() -> None:
    told = found(split(64, 1, 100.0, 100), split(32, 2, 94.3, 82), split(16, 4, 40.0, 100))
    shown = format_tune_text(told)
    assert max(map(len, shown.splitlines())) <= 80
    assert [line.split()[:4] for line in shown.splitlines() if " x " in line and line.startswith("  ")] == [
        ["64", "x", "1", "100"], ["32", "x", "2", "94.3"], ["16", "x", "4", "40"],
    ]  # fmt: skip
    assert "<td>32 x 2</td>" in render_tune_page(told)


# --- operators that grew ------------------------------------------------------------------------------------------


def test_the_operators_that_grew_most_per_sample_are_named_most_first() -> None:
    small = OperatorProfile(
        20, {"aten::mm": 1.0, "aten::sin": 0.5, "aten::add": 0.2, "aten::mul": 0.1, "aten::sum": 0.1}
    )
    large = OperatorProfile(
        45, {"aten::mm": 1.09, "aten::sin": 1.5, "aten::add": 0.3, "aten::mul": 0.4, "aten::sum": 0.15}
    )
    named = find_grown_operators("forward", small, large)
    assert [one.name for one in named] == ["aten::sin", "aten::mul", "aten::add"]
    assert named[0] == OperatorGrowth("aten::sin", "forward", 20, 45, 0.5, 1.5)


def test_what_grew_within_noise_or_is_too_small_to_matter_is_not_named() -> None:
    small = OperatorProfile(20, {"aten::mm": 1.0, "aten::view": 0.001})
    large = OperatorProfile(45, {"aten::mm": 1.09, "aten::view": 0.003})
    assert find_grown_operators("forward", small, large) == ()


def test_only_a_stage_that_operators_make_slow_is_profiled() -> None:
    before = {"forward": 1.0, "backward": 2.0, "sync": 1.0}
    assert choose_stage_to_profile(before, {"forward": 1.2, "backward": 2.5, "sync": 1.1}) == "backward"
    assert choose_stage_to_profile(before, {"forward": 1.2, "backward": 2.5, "sync": 3.0}) is None
    assert choose_stage_to_profile(before, {"forward": 1.0, "backward": 2.1, "sync": 1.0}) is None


def test_the_size_that_regressed_is_compared_with_the_fastest_below_it() -> None:
    trace = {10: 21.4, 14: 25.1, 20: 29.4, 28: 32.9, 40: 35.7, 57: 34.3, 80: 31.5}
    pair = Measurements(tuple(visited(*point) for point in trace.items())).find_regression()
    assert pair is not None
    assert [one.size for one in pair] == [40, 57]
    assert Measurements((visited(10, 20.0), visited(20, 40.0))).find_regression() is None


def test_operators_are_named_in_words_with_how_much_longer_they_take() -> None:
    operators = (
        OperatorGrowth("aten::convolution_backward", "backward", 20, 45, 0.5, 0.8),
        OperatorGrowth("aten::copy_", "backward", 20, 45, 0.0, 0.012),
    )
    told = found(operators=operators)
    assert describe_slow_operators(told["operators"]) == (
        "in the backward pass at 45 compared with 20, aten::convolution_backward takes 1.6 times as long per sample, "
        "aten::copy_ is new at 12 us per sample"
    )
    assert "In the backward pass at 45 compared with 20" in format_tune_text(told)
    assert "aten::convolution_backward takes 1.6 times" in render_tune_page(told)
    assert describe_slow_operators(found()["operators"]) == ""


def test_an_operator_belongs_to_the_stage_it_was_begun_in() -> None:
    """Named profiler ranges and collectives are not operators."""
    square = torch.ones(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        for _ in range(2):
            with record_function(f"{PHASE_PREFIX}forward"), record_function("a part of the model"):
                square @ square
            with record_function(f"{PHASE_PREFIX}optimizer"):
                square.sin()
    events = list(watched.events())
    assert "a part of the model" in {event.name for event in events}
    forward, optimizer = (sum_by_operator(events, stage, cuda=False) for stage in ("forward", "optimizer"))
    assert forward["aten::mm"] > 0 < optimizer["aten::sin"]
    assert not {"aten::sin", "a part of the model"} & forward.keys()
    assert "aten::mm" not in optimizer
    assert sum_by_operator(events, "backward", cuda=False) == {}


# --- order of measurements, and the budget ------------------------------------------------------------------------


class Walked:
    """A fake search in which every measurement takes a second."""

    def __init__(self, measurements: Measurements, speed: Callable[[int], Measurement]) -> None:
        self.measurements = measurements
        self.now_s = 0.0
        self.did: list[str] = []
        self._speed = speed

    def begin_followups(self) -> None:
        self.measurements = replace(self.measurements, closing=True)

    def measure_split(self, size: int, accumulation: int) -> None:
        self.now_s += 1
        self.did.append(f"{size}x{accumulation}")
        self.measurements = replace(self.measurements, splits=(*self.measurements.splits, self._speed(size)))

    def profile_size(self, size: int, stage: str) -> OperatorProfile | None:
        self.now_s += 1
        self.did.append(f"{stage} of {size}")
        return OperatorProfile(size, {"aten::mm": float(size)})

    def record_operators(self, operators: tuple[OperatorGrowth, ...]) -> None:
        self.measurements = replace(self.measurements, operators=operators)


def walked(
    measurements: Measurements,
    budget_s: float,
    speed: Callable[[int], Measurement] = lambda size: visited(size, 9000.0),
) -> Walked:
    survey = Walked(measurements, speed)
    council: Any = StoreGather(None, 0, 1)  # type: ignore[arg-type]
    # the search has already used its own budget
    run_followups(survey, TimeBudget(budget_s, council, clock=lambda: survey.now_s, began=-budget_s), 1)  # type: ignore[arg-type]
    return survey


def test_ways_are_timed_in_turn_there_and_back() -> None:
    survey = walked(Measurements((visited(16, 9000.0),)), budget_s=1000)
    assert survey.did == ["4x4", "8x2", "16x1", "16x1", "8x2", "4x4"]
    assert survey.measurements.closing


def test_ways_that_stay_uncertain_are_timed_again_but_not_for_ever() -> None:
    survey = walked(Measurements((visited(16, 9000.0),)), 1000, lambda size: visited(size, 9000.0, 0.3))
    assert len(survey.did) == 12


def test_a_small_part_of_the_budget_is_for_it_and_then_it_ends() -> None:
    assert walked(Measurements((visited(16, 9000.0),)), budget_s=10).did == ["4x4", "8x2"]


def test_what_would_take_longer_than_that_is_not_begun() -> None:
    """An update of 320 ms: three measurements of seven are 6.7 s; one of them and one of the slower size are 9 s."""
    slow = Measurements((visited(16, 100.0), visited(32, 66.0)))
    assert walked(slow, budget_s=40).did == []
    assert walked(slow, budget_s=50).did == ["4x4", "8x2", "16x1", "16x1", "8x2", "4x4"]


def test_both_sizes_are_profiled_where_the_larger_is_slower() -> None:
    measurements = Measurements((visited(16, 9000.0), visited(32, 6000.0)))
    survey = walked(measurements, budget_s=1000)
    assert survey.did[:3] == ["forward of 16", "forward of 32", "4x4"]
    assert survey.measurements.operators == (OperatorGrowth("aten::mm", "forward", 16, 32, 16.0, 32.0),)
    short = walked(measurements, budget_s=5)
    assert short.measurements.operators == ()
    assert short.did == ["forward of 16", "4x4"], "a budget of its own for each"


def test_a_rank_lost_in_the_closer_look_costs_nothing_that_was_found() -> None:
    before = Measurements(
        (visited(16, 9000.0),), closing=True, operators=(OperatorGrowth("aten::mm", "forward", 8, 16, 1.0, 2.0),)
    )
    facts = {"ledger": before.to_facts(), "trying": None, "spent_s": 3.0}
    assert Measurements.from_facts(mark_oom(facts)["ledger"]) == before
    split = replace(before, splits=(visited(8, 9000.0, accumulation=2),))
    assert Measurements.from_facts(split.to_facts()) == split
