"""Stage times of an update: they add up to the wall time, whatever happens in between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.telemetry.stage_clock import HostTimer, StageClock, find_critical_rank
from launcher.telemetry.stage_metrics import compute_stage_metrics
from launcher.telemetry.stages import STAGES


class ManualClock:
    """A clock that is advanced by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def run_laps(clock: StageClock, manual: ManualClock, laps: list[tuple[str, float]]) -> dict[str, float]:
    for stage, seconds in laps:
        manual.now_s += seconds
        clock.lap(stage)
    clock.end_update()
    return dict(zip(STAGES, clock.times_ms(), strict=True))


@given(st.lists(st.tuples(st.sampled_from(STAGES), st.floats(0, 10)), max_size=30))
def test_stages_add_up_to_wall_time(laps: list[tuple[str, float]]) -> None:
    manual = ManualClock()
    times = run_laps(StageClock(HostTimer(manual)), manual, laps)
    assert sum(times.values()) == pytest.approx(1e3 * sum(seconds for _, seconds in laps))


def test_time_before_start_is_not_counted() -> None:
    manual = ManualClock()
    clock = StageClock(HostTimer(manual))
    manual.now_s = 30.0
    clock.start()
    assert run_laps(clock, manual, [("data", 0.1)])["data"] == pytest.approx(100)


def test_sync_begins_after_last_bucket() -> None:
    """The communication hook of the last bucket marks the end of the backward computation."""
    manual = ManualClock()
    clock = StageClock(HostTimer(manual))
    manual.now_s = 0.2
    clock.begin_wait()
    manual.now_s = 0.5
    clock.lap_backward()
    times = run_laps(clock, manual, [])
    assert (times["backward"], times["sync"]) == (pytest.approx(200), pytest.approx(300))


def test_backward_without_communication_has_no_sync() -> None:
    manual = ManualClock()
    clock = StageClock(HostTimer(manual))
    manual.now_s = 0.5
    clock.lap_backward()
    assert run_laps(clock, manual, [])["backward"] == pytest.approx(500)


def test_critical_rank_waits_least() -> None:
    """Rank 1's data is slow: rank 0 sees this as waiting, and rank 1 is reported."""
    sync = STAGES.index("sync")
    waits = [0.0] * len(STAGES)
    waits[sync] = 80.0
    works = [0.0] * len(STAGES)
    works[0], works[sync] = 80.0, 1.0
    assert find_critical_rank((tuple(waits), tuple(works))) == 1
    values = compute_stage_metrics((tuple(waits), tuple(works)), samples=81)
    assert (values["stage/rank"], values["stage/data/ms"], values["stage/sync/ms_max"]) == (1, 80.0, 80.0)
    assert values["stage/data/share"] == pytest.approx(80 / 81)
    assert values["stage/data/samples_per_s"] == pytest.approx(81 / 0.080)
