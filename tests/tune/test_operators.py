"""Operators that take longer per sample at a larger size."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from launcher.tune.operators import OperatorGrowth, OperatorProfile, choose_stage_to_profile, find_grown_operators
from launcher.tune.profiling import PHASE_PREFIX, sum_by_operator


def test_grown_operators_are_sorted_by_growth() -> None:
    small = OperatorProfile(
        20, {"aten::mm": 1.0, "aten::sin": 0.5, "aten::add": 0.2, "aten::mul": 0.1, "aten::sum": 0.1}
    )
    large = OperatorProfile(
        45, {"aten::mm": 1.09, "aten::sin": 1.5, "aten::add": 0.3, "aten::mul": 0.4, "aten::sum": 0.15}
    )
    named = find_grown_operators("forward", small, large)
    assert [one.name for one in named] == ["aten::sin", "aten::mul", "aten::add"]
    assert named[0] == OperatorGrowth("aten::sin", "forward", 20, 45, 0.5, 1.5)


def test_small_operator_growth_is_ignored() -> None:
    small = OperatorProfile(20, {"aten::mm": 1.0, "aten::view": 0.001})
    large = OperatorProfile(45, {"aten::mm": 1.09, "aten::view": 0.003})
    assert find_grown_operators("forward", small, large) == ()


def test_only_compute_stages_are_profiled() -> None:
    before = {"forward": 1.0, "backward": 2.0, "sync": 1.0}
    assert choose_stage_to_profile(before, {"forward": 1.2, "backward": 2.5, "sync": 1.1}) == "backward"
    assert choose_stage_to_profile(before, {"forward": 1.2, "backward": 2.5, "sync": 3.0}) is None
    assert choose_stage_to_profile(before, {"forward": 1.0, "backward": 2.1, "sync": 1.0}) is None


def test_operator_time_belongs_to_its_stage() -> None:
    """Named profiler ranges and collectives are not operators."""
    square = torch.ones(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            with record_function(f"{PHASE_PREFIX}forward"), record_function("a part of the model"):
                square @ square
            with record_function(f"{PHASE_PREFIX}optimizer"):
                square.sin()
    events = list(profiler.events())
    assert "a part of the model" in {event.name for event in events}
    forward, optimizer = (sum_by_operator(events, stage, cuda=False) for stage in ("forward", "optimizer"))
    assert forward["aten::mm"] > 0 < optimizer["aten::sin"]
    assert not {"aten::sin", "a part of the model"} & forward.keys()
    assert "aten::mm" not in optimizer
    assert sum_by_operator(events, "backward", cuda=False) == {}
