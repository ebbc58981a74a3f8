"""Straggler detection names the slow rank and its slow stage."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from statistics import fmean, median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.distributed.stragglers import (
    OWN_WORK_INDICES,
    OWN_WORK_STAGES,
    STRAGGLER_WINDOW,
    Straggler,
    StragglerDetector,
    compute_others_medians,
    find_straggler,
)
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
    assert compute_others_medians(torch.tensor(values)).tolist() == pytest.approx(expected)


def test_tensor_of_times_gives_the_same_result_as_nested_sequences() -> None:
    rows = [stage_times(), stage_times(data=90.0), stage_times(forward=12.0)]
    named = [observe(StragglerDetector(), times, shares=(4, 4, 4))[1] for times in (rows, torch.tensor(rows))]
    assert named[0] == named[1] != []


#: Few different values, so that ties and medians of zero occur.
MILLISECONDS = st.sampled_from([0.0, 0.1, 0.7, 1.0, 1.3, 2.0, 10.0, 40.0, 1e-3 / 3])
WORLDS = st.integers(2, 9).flatmap(
    lambda world: st.tuples(
        st.lists(st.tuples(*[MILLISECONDS] * len(OWN_WORK_INDICES)), min_size=world, max_size=world),
        st.lists(st.integers(0, 5), min_size=world, max_size=world),
        st.frozensets(st.integers(0, world - 1)),
    )
)


@given(WORLDS)
def test_result_is_that_of_a_loop_over_the_ranks(
    case: tuple[list[tuple[float, ...]], list[int], frozenset[int]],
) -> None:
    by_rank, shares, reported = case
    found = find_straggler(torch.tensor(by_rank, dtype=torch.float64), shares, reported)
    assert found == find_straggler_by_loop(by_rank, shares, reported)


def find_straggler_by_loop(
    by_rank: Sequence[Sequence[float]], shares: Sequence[int], reported: frozenset[int]
) -> tuple[frozenset[int], Straggler | None]:
    """The definition, rank by rank."""
    work_ms = [sum(times) for times in by_rank]
    medians_ms, median_shares = list_others_medians(work_ms), list_others_medians(shares)
    factors = [max(1.0, share / (usual or 1.0)) for share, usual in zip(shares, median_shares, strict=True)]
    rows = zip(work_ms, factors, medians_ms, strict=True)
    ratios = [ms / factor / median_ms if median_ms else 1.0 for ms, factor, median_ms in rows]
    reported = frozenset(rank for rank in reported if ratios[rank] >= 1.25)
    slow = [rank for rank, ratio in enumerate(ratios) if ratio > 1.5 and rank not in reported]
    for rank in sorted(slow, key=ratios.__getitem__, reverse=True):
        rest = [row for other, row in enumerate(by_rank) if other != rank]
        others = [median(column) for column in zip(*rest, strict=True)]
        own, others_ms = by_rank[rank], median(sum(row) for row in rest)
        stage = max(range(len(own)), key=lambda index: own[index] - others[index])
        if sum(own) - others_ms > 1.0:
            straggler = Straggler(
                rank, ratios[rank], sum(own), others_ms, OWN_WORK_STAGES[stage], own[stage], others[stage]
            )
            return reported | {rank}, straggler
    return reported, None


def list_others_medians(values: Sequence[float]) -> list[float]:
    ordered, num_others = sorted(values), len(values) - 1
    middle_indices = {(num_others - 1) // 2, num_others // 2}
    positions = (bisect_left(ordered, value) for value in values)
    return [fmean(ordered[index + (index >= position)] for index in middle_indices) for position in positions]
