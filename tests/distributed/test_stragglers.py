"""Straggler detection names the slow rank and its slow stage."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import pytest

from launcher.distributed.stragglers import STRAGGLER_WINDOW, Straggler, StragglerDetector, compute_others_medians
from launcher.telemetry.stages import STAGES


def times(**ms: float) -> tuple[float, ...]:
    return tuple(
        {"data": 2.0, "forward": 10.0, "backward": 20.0, "sync": 5.0, **ms}.get(stage, 1.0) for stage in STAGES
    )


def watched(
    stragglers: StragglerDetector, rows: Sequence[tuple[float, ...]], windows: int = 1, shares: Sequence[int] = ()
) -> tuple[StragglerDetector, list[Straggler]]:
    named = []
    for _ in range(windows * STRAGGLER_WINDOW):
        stragglers, found = stragglers.with_update(rows, shares)
        named += [found] if found else []
    return stragglers, named


@pytest.mark.parametrize("stage", ["data", "transfer", "forward", "backward", "optimizer"])
@pytest.mark.parametrize("world", [2, 5])
def test_the_slow_rank_and_its_stage_are_named(stage: str, world: int) -> None:
    rows = [times() for _ in range(world)]
    rows[1] = times(**{stage: 60.0})
    _, (found,) = watched(StragglerDetector(), rows)
    assert (found.rank, found.stage, found.stage_ms) == (1, stage, 60.0)
    assert found.ratio == pytest.approx(found.own_ms / 34)
    assert f"rank 1 is slow, {found.ratio:.1f} times the others" in found.detail


def test_waiting_saving_and_validating_make_nobody_slow() -> None:
    """Ranks that wait for rank 0 show a long sync stage; only rank 0 saves and writes."""
    rows = [times(checkpoint=500.0, other=500.0), times(sync=1000.0)]
    assert watched(StragglerDetector(), rows)[1] == []


def test_a_single_long_update_is_no_straggler() -> None:
    stragglers, _ = StragglerDetector().with_update([times(), times(data=5000.0)])
    assert watched(stragglers, [times(), times()], windows=2)[1] == []


def test_it_is_named_once_until_it_has_recovered() -> None:
    slow, well = [times(), times(forward=60.0)], [times(), times()]
    stragglers, named = watched(StragglerDetector(), slow, windows=4)
    assert len(named) == 1
    stragglers, named = watched(stragglers, well)
    assert (named, stragglers.reported) == ([], frozenset())
    assert len(watched(stragglers, slow)[1]) == 1


def test_of_several_the_slowest_comes_first() -> None:
    rows = [times(), times(), times(), times(data=50.0), times(data=90.0)]
    assert [one.rank for one in watched(StragglerDetector(), rows, windows=3)[1]] == [4, 3]


def test_a_larger_share_of_the_batch_may_take_longer() -> None:
    rows = [times(forward=40.0, backward=40.0), times()]
    assert watched(StragglerDetector(), rows, shares=(20, 10))[1] == []
    assert len(watched(StragglerDetector(), rows, shares=(10, 10))[1]) == 1


def test_one_worker_has_nobody_to_be_compared_with() -> None:
    stragglers, named = watched(StragglerDetector(), [times(data=900.0)], windows=3)
    assert named == []
    assert stragglers.rows == ()


def test_twenty_short_updates_are_too_little_to_name_anybody() -> None:
    """Updates of 13 ms: a disturbance of rank 1 for 20 updates raises no alarm, a lasting one does."""
    rows = [times(backward=2.0, forward=1.0, sync=0.0), times(backward=6.0, forward=1.0, sync=0.0)]
    per_update_ms = max(map(sum, rows))
    stragglers, _ = StragglerDetector().with_update(
        [times(other=600.0), times(other=600.0)]
    )  # a first update, a validation
    stragglers, named = watched(stragglers, rows)
    assert (named, len(stragglers.rows)) == ([], 21)
    for _ in range(int((500 - 25) / per_update_ms) + 1 - 20):
        stragglers, found = stragglers.with_update(rows)
    assert found is not None
    assert (found.rank, found.stage) == (1, "backward")
    assert stragglers.rows == ()


def test_differences_below_a_millisecond_are_noise() -> None:
    fast = tuple(value / 100 for value in times())
    assert watched(StragglerDetector(), [fast, tuple(2 * value for value in fast)])[1] == []


@pytest.mark.parametrize("values", [[3.0, 1.0], [2.0, 2.0, 9.0], [5.0, 1.0, 1.0, 7.0, 3.0], [4.0, 8.0, 4.0, 1.0]])
def test_the_median_of_the_others(values: list[float]) -> None:
    expected = [median(values[:i] + values[i + 1 :]) for i in range(len(values))]
    assert compute_others_medians(values) == pytest.approx(expected)
