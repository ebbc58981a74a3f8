"""Shares from measured speeds: changed only for a gain above 5 %, with the global batch unchanged."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.distributed.load_balancing import BALANCE_WINDOW, SpeedWindow, compute_slowest_ms, find_faster_shares
from launcher.plan.batch import BatchPlan, BatchPolicy, plan_batch

HOLD = BatchPolicy(kind="hold", per_device=64, global_batch=60)


def make_plan(speeds: Sequence[float]) -> BatchPlan:
    return plan_batch(HOLD, len(speeds), speeds)


def make_window(plan: BatchPlan, *work_ms: float, updates: int = BALANCE_WINDOW) -> SpeedWindow:
    speeds = SpeedWindow(plan)
    for _ in range(updates):
        speeds = speeds.with_update(work_ms)
    return speeds


EVEN = plan_batch(HOLD, 3)


def test_half_speed_rank_gets_half_the_samples() -> None:
    speeds = find_faster_shares(make_window(EVEN, 10.0, 10.0, 20.0), make_plan)
    assert speeds is not None
    assert make_plan(speeds).shares == (24, 24, 12)
    assert make_plan(speeds).global_batch == 60


def test_gain_below_five_percent_changes_nothing() -> None:
    assert find_faster_shares(make_window(EVEN, 10.0, 10.0, 10.7), make_plan) is None
    assert find_faster_shares(make_window(EVEN, 10.0, 10.0, 11.5), make_plan) is not None


def test_shares_stay_until_window_is_full() -> None:
    assert find_faster_shares(make_window(EVEN, 10.0, 10.0, 90.0, updates=BALANCE_WINDOW - 1), make_plan) is None


def test_single_slow_update_changes_nothing() -> None:
    speeds = make_window(EVEN, 10.0, 10.0, 10.0).with_update((10.0, 10.0, 500.0))
    assert find_faster_shares(speeds, make_plan) is None


def test_rank_too_slow_for_samples_keeps_share() -> None:
    assert find_faster_shares(make_window(EVEN, 1.0, 1.0, 1e6), make_plan) is None


def test_shares_settle_after_one_change() -> None:
    """Speeds per sample stay the same, so the next measurement finds nothing to gain."""
    speeds = find_faster_shares(make_window(EVEN, 10.0, 10.0, 20.0), make_plan)
    assert speeds is not None
    plan = make_plan(speeds)
    again = make_window(plan, *(share / speed for share, speed in zip(plan.shares, speeds, strict=True)))
    assert find_faster_shares(again, make_plan) is None


@given(st.lists(st.floats(0.2, 5.0), min_size=2, max_size=8))
def test_new_shares_speed_up_slowest_rank(true_speeds: list[float]) -> None:
    plan = make_plan([1.0] * len(true_speeds))
    times = [share / speed for share, speed in zip(plan.shares, true_speeds, strict=True)]
    speeds = find_faster_shares(make_window(plan, *times), make_plan)
    if speeds is not None:
        changed = make_plan(speeds)
        assert changed.global_batch == plan.global_batch
        assert compute_slowest_ms(changed.shares, true_speeds) * 1.05 < compute_slowest_ms(plan.shares, true_speeds) * (
            1 + 1e-9
        )
        assert max(times) == pytest.approx(compute_slowest_ms(plan.shares, true_speeds) * 60)
