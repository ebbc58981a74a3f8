"""Shares from measured speeds: changed only for a gain above 5 %, with the global batch unchanged."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.distributed.load_balancing import BALANCE_WINDOW, SpeedWindow, compute_slowest_ms, faster_shares
from launcher.plan.batch import BatchPlan, BatchPolicy, plan_batch

HOLD = BatchPolicy(kind="hold", per_device=64, global_batch=60)


def planned(speeds: Sequence[float]) -> BatchPlan:
    return plan_batch(HOLD, len(speeds), speeds)


def measured(plan: BatchPlan, *work_ms: float, updates: int = BALANCE_WINDOW) -> SpeedWindow:
    speeds = SpeedWindow(plan)
    for _ in range(updates):
        speeds = speeds.with_update(work_ms)
    return speeds


EVEN = plan_batch(HOLD, 3)


def test_a_rank_at_half_the_speed_gets_half_the_samples() -> None:
    speeds = faster_shares(measured(EVEN, 10.0, 10.0, 20.0), planned)
    assert speeds is not None
    assert planned(speeds).shares == (24, 24, 12)
    assert planned(speeds).global_batch == 60


def test_a_gain_of_up_to_five_percent_is_left_alone() -> None:
    assert faster_shares(measured(EVEN, 10.0, 10.0, 10.7), planned) is None
    assert faster_shares(measured(EVEN, 10.0, 10.0, 11.5), planned) is not None


def test_nothing_is_decided_before_the_window_is_full() -> None:
    assert faster_shares(measured(EVEN, 10.0, 10.0, 90.0, updates=BALANCE_WINDOW - 1), planned) is None


def test_one_slow_update_is_no_slow_rank() -> None:
    speeds = measured(EVEN, 10.0, 10.0, 10.0).with_update((10.0, 10.0, 500.0))
    assert faster_shares(speeds, planned) is None


def test_a_rank_so_slow_that_it_would_get_nothing_keeps_its_share() -> None:
    assert faster_shares(measured(EVEN, 1.0, 1.0, 1e6), planned) is None


def test_after_a_change_it_is_measured_anew_and_settles() -> None:
    """Speeds per sample stay the same, so the next measurement finds nothing to gain."""
    speeds = faster_shares(measured(EVEN, 10.0, 10.0, 20.0), planned)
    assert speeds is not None
    plan = planned(speeds)
    again = measured(plan, *(share / speed for share, speed in zip(plan.shares, speeds, strict=True)))
    assert faster_shares(again, planned) is None


@given(st.lists(st.floats(0.2, 5.0), min_size=2, max_size=8))
def test_a_change_always_makes_the_slowest_rank_faster(true_speeds: list[float]) -> None:
    plan = planned([1.0] * len(true_speeds))
    times = [share / speed for share, speed in zip(plan.shares, true_speeds, strict=True)]
    speeds = faster_shares(measured(plan, *times), planned)
    if speeds is not None:
        changed = planned(speeds)
        assert changed.global_batch == plan.global_batch
        assert compute_slowest_ms(changed.shares, true_speeds) * 1.05 < compute_slowest_ms(plan.shares, true_speeds) * (
            1 + 1e-9
        )
        assert max(times) == pytest.approx(compute_slowest_ms(plan.shares, true_speeds) * 60)
