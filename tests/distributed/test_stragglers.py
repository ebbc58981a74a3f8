"""Straggler detection names the slow rank and its slow stage."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import pytest

from launcher.distributed.stragglers import STRAGGLER_WINDOW, Straggler, StragglerDetector, compute_others_medians
from launcher.telemetry.stages import STAGES


def stage_times(**ms: float) -> tuple[float, ...]:
    return tuple(
        {"data": 2.0, "forward": 10.0, "backward": 20.0, "sync": 5.0, **ms}.get(stage, 1.0) for stage in STAGES
    )


def observe(
    stragglers: StragglerDetector, rows: Sequence[tuple[float, ...]], windows: int = 1, shares: Sequence[int] = ()
) -> tuple[StragglerDetector, list[Straggler]]:
    named = []
    for _ in range(windows * STRAGGLER_WINDOW):
        stragglers, found = stragglers.with_update(rows, shares)
        named += [found] if found else []
    return stragglers, named


@pytest.mark.parametrize("stage", ["data", "transfer", "forward", "backward", "optimizer"])
@pytest.mark.parametrize("world", [2, 5])
def test_slow_rank_and_stage_are_reported(stage: str, world: int) -> None:
    rows = [stage_times() for _ in range(world)]
    rows[1] = stage_times(**{stage: 60.0})
    _, (found,) = observe(StragglerDetector(), rows)
    assert (found.rank, found.stage, found.stage_ms) == (1, stage, 60.0)
    assert found.ratio == pytest.approx(found.own_ms / 34)
    assert f"rank 1 is slow, {found.ratio:.1f} times the others" in found.detail


def test_waiting_and_checkpoint_stages_raise_no_alarm() -> None:
    """Ranks that wait for rank 0 show a long sync stage; only rank 0 saves and writes."""
    rows = [stage_times(checkpoint=500.0, other=500.0), stage_times(sync=1000.0)]
    assert observe(StragglerDetector(), rows)[1] == []


def test_single_long_update_raises_no_alarm() -> None:
    stragglers, _ = StragglerDetector().with_update([stage_times(), stage_times(data=5000.0)])
    assert observe(stragglers, [stage_times(), stage_times()], windows=2)[1] == []


def test_straggler_is_reported_once_until_recovered() -> None:
    slow, well = [stage_times(), stage_times(forward=60.0)], [stage_times(), stage_times()]
    stragglers, named = observe(StragglerDetector(), slow, windows=4)
    assert len(named) == 1
    stragglers, named = observe(stragglers, well)
    assert (named, stragglers.reported) == ([], frozenset())
    assert len(observe(stragglers, slow)[1]) == 1


def test_slowest_straggler_is_reported_first() -> None:
    rows = [stage_times(), stage_times(), stage_times(), stage_times(data=50.0), stage_times(data=90.0)]
    assert [one.rank for one in observe(StragglerDetector(), rows, windows=3)[1]] == [4, 3]


def test_times_are_compared_per_sample_share() -> None:
    rows = [stage_times(forward=40.0, backward=40.0), stage_times()]
    assert observe(StragglerDetector(), rows, shares=(20, 10))[1] == []
    assert len(observe(StragglerDetector(), rows, shares=(10, 10))[1]) == 1


def test_single_worker_has_no_straggler() -> None:
    stragglers, named = observe(StragglerDetector(), [stage_times(data=900.0)], windows=3)
    assert named == []
    assert stragglers.rows == ()


def test_short_disturbance_raises_no_alarm() -> None:
    """Updates of 13 ms: a disturbance of rank 1 for 20 updates raises no alarm, a lasting one does."""
    rows = [stage_times(backward=2.0, forward=1.0, sync=0.0), stage_times(backward=6.0, forward=1.0, sync=0.0)]
    per_update_ms = max(map(sum, rows))
    stragglers, _ = StragglerDetector().with_update(
        [stage_times(other=600.0), stage_times(other=600.0)]
    )  # a first update, a validation
    stragglers, named = observe(stragglers, rows)
    assert (named, len(stragglers.rows)) == ([], 21)
    for _ in range(int((500 - 25) / per_update_ms) + 1 - 20):
        stragglers, found = stragglers.with_update(rows)
    assert found is not None
    assert (found.rank, found.stage) == (1, "backward")
    assert stragglers.rows == ()


def test_sub_millisecond_differences_raise_no_alarm() -> None:
    fast = tuple(value / 100 for value in stage_times())
    assert observe(StragglerDetector(), [fast, tuple(2 * value for value in fast)])[1] == []


@pytest.mark.parametrize("values", [[3.0, 1.0], [2.0, 2.0, 9.0], [5.0, 1.0, 1.0, 7.0, 3.0], [4.0, 8.0, 4.0, 1.0]])
def test_others_medians_match_definition(values: list[float]) -> None:
    expected = [median(values[:i] + values[i + 1 :]) for i in range(len(values))]
    assert compute_others_medians(values) == pytest.approx(expected)
