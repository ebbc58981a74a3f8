"""The updates of a run: every sample once per epoch, for any world size, ramp, tail and restart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.plan.batch import BatchPlan, BatchPolicy, plan_batch
from launcher.plan.timeline import MicroBatch, Position, Timeline, Update

START = Position()


def make_hold_plan(batch: int, world: int, cap: int = 4) -> BatchPlan:
    return plan_batch(BatchPolicy("hold", cap, global_batch=batch, allow_idle=True), world)


def make_timeline(size: int, duration: int, batch: int, world: int = 2, tail: str = "flush") -> Timeline:
    return Timeline(size, duration, ((0, make_hold_plan(batch, world)),), tail)  # type: ignore[arg-type]


def list_ranges(timeline: Timeline, position: Position = START) -> list[tuple[int, int]]:
    return [(update.start, update.end) for update in timeline.iter_updates(position)]


def list_positions(micro: MicroBatch, size: int) -> list[int]:
    """Return the positions in the whole run that a micro-batch covers."""
    return [epoch * size + offset for epoch, start, stop in micro.spans for offset in range(start, stop)]


def list_consumed(update: Update) -> list[int]:
    """Return the positions that all ranks cover, rank by rank, in order."""
    micro_batches = [micro for rank in range(update.plan.world) for micro in update.micro_batches(rank)]
    return [offset for micro in micro_batches if not micro.is_padding for offset in list_positions(micro, update.size)]


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


def test_flushed_tail_is_a_separate_update() -> None:
    assert list_ranges(make_timeline(10, 20, batch=4)) == [(0, 4), (4, 8), (8, 10), (10, 14), (14, 18), (18, 20)]


def test_carried_tail_continues_into_next_epoch() -> None:
    assert list_ranges(make_timeline(10, 20, batch=4, tail="carry")) == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]


@pytest.mark.parametrize("tail", ["flush", "carry"])
def test_last_update_is_truncated_to_the_duration(tail: str) -> None:
    assert list_ranges(make_timeline(10, 7, batch=4, tail=tail)) == [(0, 4), (4, 7)]


def test_tail_truncates_the_current_plan() -> None:
    whole, _, cut, *_ = make_timeline(10, 20, batch=4).iter_updates()
    assert (whole.is_partial, whole.plan, whole.samples) == (False, whole.full_plan, 4)
    assert (cut.is_partial, cut.plan, cut.samples) == (True, cut.full_plan.truncated(2), 2)


def test_stage_takes_effect_at_the_next_update() -> None:
    timeline = Timeline(100, 30, ((0, make_hold_plan(4, 2)), (6, make_hold_plan(8, 2)), (24, make_hold_plan(10, 2))))
    assert list_ranges(timeline) == [(0, 4), (4, 8), (8, 16), (16, 24), (24, 30)]
    assert [update.full_plan.global_batch for update in timeline.iter_updates()] == [4, 4, 8, 8, 10]


def test_stage_within_one_update_is_skipped() -> None:
    timeline = Timeline(100, 20, ((0, make_hold_plan(10, 2)), (3, make_hold_plan(4, 2)), (9, make_hold_plan(5, 2))))
    assert [update.samples for update in timeline.iter_updates()] == [10, 5, 5]


def test_finished_or_empty_run_has_no_updates() -> None:
    assert list_ranges(make_timeline(10, 0, batch=4)) == []
    assert list_ranges(make_timeline(10, 20, batch=4), Position(20, 6)) == []
    assert make_timeline(10, 20, batch=4).count_updates(Position(24, 6)) == 0


# Assignment to ranks


def test_ranks_take_contiguous_slices_of_micro_batches() -> None:
    (update,) = make_timeline(100, 13, batch=13, world=2).iter_updates()
    assert [micro.spans for micro in update.micro_batches(0)] == [((0, 0, 4),), ((0, 4, 7),)]
    assert [micro.spans for micro in update.micro_batches(1)] == [((0, 7, 10),), ((0, 10, 13),)]
    assert [micro.size for micro in update.micro_batches(0)] == [4, 3]


def test_carried_update_spans_two_epochs() -> None:
    update = list(make_timeline(10, 20, batch=8, tail="carry").iter_updates())[1]
    assert (update.start, update.epoch) == (8, 0)
    assert update.micro_batches(0) == (MicroBatch(((0, 8, 10), (1, 0, 2))),)
    assert update.micro_batches(1) == (MicroBatch(((1, 2, 6),), shard=1),)


def test_carried_update_may_hold_whole_epochs() -> None:
    (update,) = make_timeline(3, 8, batch=8, world=1, tail="carry").iter_updates()
    assert [micro.spans for micro in update.micro_batches(0)] == [((0, 0, 3), (1, 0, 1)), ((1, 1, 3), (2, 0, 2))]


def test_rank_without_samples_gets_one_padding() -> None:
    *_, cut = make_timeline(9, 9, batch=4, world=3).iter_updates()
    assert [micro.is_padding for rank in range(3) for micro in cut.micro_batches(rank)] == [False, True, True]
    assert cut.micro_batches(2) == (MicroBatch(((0, 8, 9),), is_padding=True, shard=2),)
    assert cut.micro_batches(2)[0].size == 1


# Invariants of every run


@given(timelines())
def test_every_sample_is_taken_once_in_order(timeline: Timeline) -> None:
    offsets = [offset for update in timeline.iter_updates() for offset in list_consumed(update)]
    assert offsets == list(range(timeline.duration))


@given(timelines())
def test_ranks_together_cover_the_update_by_shares(timeline: Timeline) -> None:
    for update in timeline.iter_updates():
        assert list_consumed(update) == list(range(update.start, update.end))
        for rank, share in enumerate(update.plan.shares):
            micro = [part for part in update.micro_batches(rank) if not part.is_padding]
            assert tuple(part.size for part in micro) == update.plan.micro_batches(rank)
            assert sum(part.size for part in micro) == share


@given(timelines())
def test_updates_are_consecutive_and_within_bounds(timeline: Timeline) -> None:
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
def test_restart_after_any_update_gives_same_remainder(timeline: Timeline, data: st.DataObject) -> None:
    updates = list(timeline.iter_updates())
    finished = data.draw(st.integers(0, len(updates)))
    position = updates[finished - 1].next_position if finished else Position()
    assert list(timeline.iter_updates(position)) == updates[finished:]


@given(timelines(), st.integers(0, 450), st.integers(0, 9))
def test_restart_at_any_position_covers_remainder_once(timeline: Timeline, samples: int, update: int) -> None:
    rest = list(timeline.iter_updates(Position(samples, update)))
    assert [offset for each in rest for offset in list_consumed(each)] == list(range(samples, timeline.duration))
    assert [each.index for each in rest] == list(range(update, update + len(rest)))
    assert timeline.count_updates(Position(samples, update)) == len(rest)


@given(st.integers(1, 60), st.integers(0, 200), st.integers(1, 30), st.sampled_from(["flush", "carry"]))
def test_order_is_equal_at_every_world_size(size: int, duration: int, batch: int, tail: str) -> None:
    runs = [make_timeline(size, duration, batch, world, tail) for world in range(1, 9)]
    assert len({tuple(list_ranges(run)) for run in runs}) == 1
    assert (
        len({tuple(offset for update in run.iter_updates() for offset in list_consumed(update)) for run in runs}) == 1
    )


@given(st.data(), st.sampled_from(["flush", "carry"]))
def test_order_survives_changes_of_world_size(data: st.DataObject, tail: str) -> None:
    """Elastic: each segment of updates has another world size and batch, and only the position is passed on."""
    position, offsets = Position(), []
    for world in data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=6)):
        timeline = Timeline(37, 150, ((0, plan_batch(BatchPolicy("scale", 3), world)),), tail)  # type: ignore[arg-type]
        for update in itertools.islice(timeline.iter_updates(position), data.draw(st.integers(0, 8))):
            offsets += list_consumed(update)
            position = update.next_position
    assert offsets == list(range(position.samples))


# Duration


def test_counting_updates_is_constant_time() -> None:
    timeline = make_timeline(1437, 1437 * 10**15 + 5, batch=256)
    assert timeline.count_updates() == 10**15 * 6 + 1


def test_iteration_from_late_position_is_constant_time() -> None:
    timeline = make_timeline(10**9, 10**15, batch=1024)
    first = next(timeline.iter_updates(Position(10**14 + 7, 5)))
    assert (first.start, first.index, first.epoch) == (10**14 + 7, 5, 10**5)


class CountedShares(tuple[int, ...]):
    """Shares that count how many of them are read."""

    reads = 0

    def __getitem__(self, index: object) -> object:  # type: ignore[override]
        CountedShares.reads += len(range(*index.indices(len(self)))) if isinstance(index, slice) else 1
        return super().__getitem__(index)  # type: ignore[index]

    def __iter__(self) -> Iterator[int]:
        for value in super().__iter__():
            CountedShares.reads += 1
            yield value


@pytest.mark.parametrize("even", [False, True])
def test_an_update_reads_no_more_shares_in_a_larger_world(even: bool) -> None:
    """Neither in a whole epoch's updates nor in the short ones at the ends of the epochs."""
    reads = {}
    for world in (10, 1000):
        plan = replace(make_hold_plan(2 * world, world), shares=CountedShares([2] * world))
        timeline = Timeline(5 * world, 10**6, ((0, plan),), even=even)
        updates = itertools.islice(timeline.iter_updates(), 60)
        for update in itertools.islice(updates, 30):  # in which the plan and that of the last update are made
            update.micro_batches(world - 1)
        CountedShares.reads = 0
        for update in updates:
            update.micro_batches(world - 1)
        reads[world] = CountedShares.reads
    assert reads[1000] == reads[10] <= 30 * 4


# Invalid timelines


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"duration": -1},
        {"stages": ()},
        {"stages": ((1, make_hold_plan(4, 2)),)},
        {"stages": ((0, make_hold_plan(4, 2)), (0, make_hold_plan(8, 2)))},
        {"tail": "drop"},
    ],
)
def test_invalid_timeline_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"invalid timeline|stages must ascend from 0|neither flush nor carry"):
        replace(make_timeline(10, 20, batch=4), **change)
