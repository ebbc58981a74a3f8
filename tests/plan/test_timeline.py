"""The updates of a run: every sample once per epoch, for any world size, ramp, tail and restart."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.plan.batch import BatchPlan, BatchPolicy, plan_batch
from launcher.plan.timeline import MicroBatch, Position, Timeline, Update

START = Position()


def hold(batch: int, world: int, cap: int = 4) -> BatchPlan:
    return plan_batch(BatchPolicy("hold", cap, global_batch=batch, allow_idle=True), world)


def one_stage(size: int, duration: int, batch: int, world: int = 2, tail: str = "flush") -> Timeline:
    return Timeline(size, duration, ((0, hold(batch, world)),), tail)  # type: ignore[arg-type]


def windows(timeline: Timeline, position: Position = START) -> list[tuple[int, int]]:
    return [(update.start, update.end) for update in timeline.iter_updates(position)]


def places(micro: MicroBatch, size: int) -> list[int]:
    """Return the positions in the whole run that a micro-batch covers."""
    return [epoch * size + place for epoch, start, stop in micro.spans for place in range(start, stop)]


def consumed(update: Update) -> list[int]:
    """Return the positions that all ranks cover, rank by rank, in order."""
    micro_batches = [micro for rank in range(update.plan.world) for micro in update.micro_batches(rank)]
    return [place for micro in micro_batches if not micro.is_padding for place in places(micro, update.size)]


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    world = draw(st.integers(1, 6))
    begins = sorted({0, *draw(st.lists(st.integers(1, 300), max_size=3))})
    speeds = draw(st.none() | st.lists(st.floats(0.2, 5), min_size=world, max_size=world))
    policies = [
        BatchPolicy("hold", draw(st.integers(1, 9)), global_batch=draw(st.integers(1, 40)), allow_idle=True)
    ] * len(begins)
    sizes = [draw(st.integers(1, 40)) for _ in begins]
    plans = [plan_batch(replace(p, global_batch=b), world, speeds) for p, b in zip(policies, sizes, strict=True)]
    return Timeline(
        size=draw(st.integers(1, 90)),
        duration=draw(st.integers(0, 400)),
        stages=tuple(zip(begins, plans, strict=True)),
        tail=draw(st.sampled_from(["flush", "carry"])),
    )


# Windows


def test_an_epochs_tail_is_an_update_of_its_own() -> None:
    assert windows(one_stage(10, 20, batch=4)) == [(0, 4), (4, 8), (8, 10), (10, 14), (14, 18), (18, 20)]


def test_a_carried_tail_goes_on_into_the_next_epoch() -> None:
    assert windows(one_stage(10, 20, batch=4, tail="carry")) == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]


@pytest.mark.parametrize("tail", ["flush", "carry"])
def test_the_last_update_is_cut_to_the_duration(tail: str) -> None:
    assert windows(one_stage(10, 7, batch=4, tail=tail)) == [(0, 4), (4, 7)]


def test_a_tail_is_cut_from_the_plan_in_force() -> None:
    whole, _, cut, *_ = one_stage(10, 20, batch=4).iter_updates()
    assert (whole.is_partial, whole.plan, whole.samples) == (False, whole.full_plan, 4)
    assert (cut.is_partial, cut.plan, cut.samples) == (True, cut.full_plan.truncated(2), 2)


def test_a_stage_takes_effect_at_the_first_update_from_its_time_on() -> None:
    timeline = Timeline(100, 30, ((0, hold(4, 2)), (6, hold(8, 2)), (24, hold(10, 2))))
    assert windows(timeline) == [(0, 4), (4, 8), (8, 16), (16, 24), (24, 30)]
    assert [update.full_plan.global_batch for update in timeline.iter_updates()] == [4, 4, 8, 8, 10]


def test_a_stage_may_be_passed_over() -> None:
    timeline = Timeline(100, 20, ((0, hold(10, 2)), (3, hold(4, 2)), (9, hold(5, 2))))
    assert [update.samples for update in timeline.iter_updates()] == [10, 5, 5]


def test_a_run_of_nothing_has_no_update() -> None:
    assert windows(one_stage(10, 0, batch=4)) == []
    assert windows(one_stage(10, 20, batch=4), Position(20, 6)) == []
    assert one_stage(10, 20, batch=4).count_updates(Position(24, 6)) == 0


# Assignment to ranks


def test_ranks_take_contiguous_slices_cut_into_micro_batches() -> None:
    (update,) = one_stage(100, 13, batch=13, world=2).iter_updates()
    assert [micro.spans for micro in update.micro_batches(0)] == [((0, 0, 4),), ((0, 4, 7),)]
    assert [micro.spans for micro in update.micro_batches(1)] == [((0, 7, 10),), ((0, 10, 13),)]
    assert [micro.size for micro in update.micro_batches(0)] == [4, 3]


def test_a_carried_window_spans_two_epochs() -> None:
    update = list(one_stage(10, 20, batch=8, tail="carry").iter_updates())[1]
    assert (update.start, update.epoch) == (8, 0)
    assert update.micro_batches(0) == (MicroBatch(((0, 8, 10), (1, 0, 2))),)
    assert update.micro_batches(1) == (MicroBatch(((1, 2, 6),), shard=1),)


def test_a_carried_window_may_hold_whole_epochs() -> None:
    (update,) = one_stage(3, 8, batch=8, world=1, tail="carry").iter_updates()
    assert [micro.spans for micro in update.micro_batches(0)] == [((0, 0, 3), (1, 0, 1)), ((1, 1, 3), (2, 0, 2))]


def test_a_rank_without_samples_gets_one_pad() -> None:
    *_, cut = one_stage(9, 9, batch=4, world=3).iter_updates()
    assert [micro.is_padding for rank in range(3) for micro in cut.micro_batches(rank)] == [False, True, True]
    assert cut.micro_batches(2) == (MicroBatch(((0, 8, 9),), is_padding=True, shard=2),)
    assert cut.micro_batches(2)[0].size == 1


# Invariants of every run


@given(timelines())
def test_every_sample_of_every_epoch_is_taken_once_and_in_order(timeline: Timeline) -> None:
    taken = [place for update in timeline.iter_updates() for place in consumed(update)]
    assert taken == list(range(timeline.duration))


@given(timelines())
def test_the_ranks_together_take_the_window_and_share_by_the_plan(timeline: Timeline) -> None:
    for update in timeline.iter_updates():
        assert consumed(update) == list(range(update.start, update.end))
        for rank, share in enumerate(update.plan.shares):
            micro = [part for part in update.micro_batches(rank) if not part.is_padding]
            assert tuple(part.size for part in micro) == update.plan.micro_batches(rank)
            assert sum(part.size for part in micro) == share


@given(timelines())
def test_windows_follow_one_another_and_keep_within_their_bounds(timeline: Timeline) -> None:
    updates = list(timeline.iter_updates())
    assert [update.index for update in updates] == list(range(len(updates)))
    for update, following in itertools.pairwise(updates):
        assert update.next_position == Position(following.start, following.index)
    for update in updates:
        assert 1 <= update.samples <= update.full_plan.global_batch
        assert update.end <= timeline.duration
        assert timeline.tail == "carry" or update.end <= (update.epoch + 1) * timeline.size
        epoch_ends = timeline.tail == "flush" and update.end % timeline.size == 0
        assert not update.is_partial or epoch_ends or update.end == timeline.duration


@given(timelines(), st.data())
def test_a_restart_after_any_update_gives_the_same_rest(timeline: Timeline, data: st.DataObject) -> None:
    updates = list(timeline.iter_updates())
    finished = data.draw(st.integers(0, len(updates)))
    position = updates[finished - 1].next_position if finished else Position()
    assert list(timeline.iter_updates(position)) == updates[finished:]


@given(timelines(), st.integers(0, 450), st.integers(0, 9))
def test_a_restart_at_any_position_takes_the_rest_once(timeline: Timeline, samples: int, update: int) -> None:
    rest = list(timeline.iter_updates(Position(samples, update)))
    assert [place for each in rest for place in consumed(each)] == list(range(samples, timeline.duration))
    assert [each.index for each in rest] == list(range(update, update + len(rest)))
    assert timeline.count_updates(Position(samples, update)) == len(rest)


@given(st.integers(1, 60), st.integers(0, 200), st.integers(1, 30), st.sampled_from(["flush", "carry"]))
def test_the_order_is_the_same_at_every_world_size(size: int, duration: int, batch: int, tail: str) -> None:
    runs = [one_stage(size, duration, batch, world, tail) for world in range(1, 9)]
    assert len({tuple(windows(run)) for run in runs}) == 1
    assert len({tuple(place for update in run.iter_updates() for place in consumed(update)) for run in runs}) == 1


@given(st.data(), st.sampled_from(["flush", "carry"]))
def test_the_order_survives_any_change_of_world(data: st.DataObject, tail: str) -> None:
    """Elastic: each segment of updates has another world size and batch, and only the position is passed on."""
    position, taken = Position(), []
    for world in data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=6)):
        timeline = Timeline(37, 150, ((0, plan_batch(BatchPolicy("scale", 3), world)),), tail)  # type: ignore[arg-type]
        for update in itertools.islice(timeline.iter_updates(position), data.draw(st.integers(0, 8))):
            taken += consumed(update)
            position = update.next_position
    assert taken == list(range(position.samples))


# Duration


def test_counting_does_not_walk_through_the_epochs() -> None:
    timeline = one_stage(1437, 1437 * 10**15 + 5, batch=256)
    assert timeline.count_updates() == 10**15 * 6 + 1


def test_a_position_deep_in_a_run_is_reached_at_once() -> None:
    timeline = one_stage(10**9, 10**15, batch=1024)
    first = next(timeline.iter_updates(Position(10**14 + 7, 5)))
    assert (first.start, first.index, first.epoch) == (10**14 + 7, 5, 10**5)


# Invalid timelines


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"duration": -1},
        {"stages": ()},
        {"stages": ((1, hold(4, 2)),)},
        {"stages": ((0, hold(4, 2)), (0, hold(8, 2)))},
        {"tail": "drop"},
    ],
)
def test_what_is_no_timeline_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"invalid timeline|stages must ascend from 0|neither flush nor carry"):
        replace(one_stage(10, 20, batch=4), **change)
