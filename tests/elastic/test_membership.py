"""The rules of the membership one by one, with times; all short histories are in test_membership_histories."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from launcher.elastic.events import (
    AllLost,
    Connected,
    Disconnected,
    Effect,
    Ended,
    Event,
    Fence,
    Received,
    Tell,
    Ticked,
)
from launcher.elastic.membership import Membership, MembershipLimits
from launcher.elastic.messages import (
    Change,
    Complete,
    Finish,
    Heartbeat,
    HeartbeatAnswer,
    Hello,
    Leave,
    Ready,
    Release,
    Request,
    Round,
    Welcome,
)


class Job:
    """A membership, its time, and the effects of the latest event."""

    def __init__(self, expected: int = 1, **limits: float | None) -> None:
        self.now = 100.0
        self.membership = Membership.start(MembershipLimits(expected, **limits), self.now)  # type: ignore[arg-type]
        self.effects: tuple[Effect, ...] = ()
        self.arrived = 0

    def handle(self, event: Event) -> Sequence[Effect]:
        self.membership, self.effects = self.membership.handle(event)
        return self.effects

    def connect(self, slot: int | None = None, node: str = "node") -> int:
        """Connect from a slot, or from one of its own."""
        self.arrived += 1
        self.handle(Connected(self.now, self.arrived, node, 100 + self.arrived if slot is None else slot))
        return self.arrived

    def send(self, member: int, message: Request) -> Sequence[Effect]:
        return self.handle(Received(self.now, member, message))

    def ready(self, member: int, after: int | None = None, updates: int = 0, has_state: bool = True) -> None:
        """Report as a trainer does that knows the newest round."""
        found = self.membership.find_member(member)
        known = after if after is not None else found.round if found else 0
        self.send(member, Ready(known, updates, has_state, host=f"host{member}", port=1000 + member))

    def die(self, member: int) -> Sequence[Effect]:
        return self.handle(Disconnected(self.now, member))

    def tick(self, seconds: float, alive: Sequence[int] = ()) -> list[Effect]:
        """Let time pass in small steps; the members in `alive` are heard of in each."""
        effects: list[Effect] = []
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 0.5)
            for member in alive:
                self.send(member, Heartbeat(0))
            effects += self.handle(Ticked(self.now))
        return effects

    def form(self, *members: int, updates: int = 0, has_state: bool = True) -> Round:
        """Have these members report, and return the round that is published then."""
        for member in members:
            self.ready(member, updates=updates, has_state=has_state)
        return self.published

    @property
    def published(self) -> Round:
        """The round that the latest event has published."""
        return self.rounds[0]

    @property
    def newest(self) -> Round:
        assert self.membership.round is not None
        return self.membership.round

    @property
    def rounds(self) -> list[Round]:
        return [each.message for each in self.effects if isinstance(each, Tell) and isinstance(each.message, Round)]

    def told(self, member: int) -> list[object]:
        return [each.message for each in self.effects if isinstance(each, Tell) and each.member == member]


def start_job(workers: int, **limits: float | None) -> Job:
    """A job whose first round is formed."""
    job = Job(workers, **limits)
    job.form(*(job.connect(slot) for slot in range(workers)))
    assert job.membership.round
    return job


def list_members(round_: Round) -> list[int]:
    return [member.member for member in round_.members]


# --- rounds ---------------------------------------------------------------------------------------------------------


def test_first_round_waits_for_the_expected_workers_and_takes_their_slots_as_ranks() -> None:
    job = Job(3)
    late, early = job.connect(slot=2), job.connect(slot=0)
    assert job.told(early) == [Welcome(early, 3.0)]
    job.ready(late)
    job.ready(early)
    job.tick(600.0, alive=[late, early])
    assert job.membership.round is None
    middle = job.connect(slot=1)
    round_ = job.form(middle)
    assert list_members(round_) == [early, middle, late]
    assert (round_.number, round_.host, round_.port) == (1, "host2", 1002)
    assert [round_.find_rank(member) for member in (early, middle, late)] == [0, 1, 2]


def test_newcomers_are_ordered_by_node_and_slot() -> None:
    job = Job(4)
    places = [("b", 1), ("a", 1), ("b", 0), ("a", 0)]
    round_ = job.form(*(job.connect(slot, node) for node, slot in places))
    assert [(member.node, member.slot) for member in round_.members] == sorted(places)


def test_nobody_gives_the_state_while_nobody_holds_one() -> None:
    job = Job(2)
    round_ = job.form(job.connect(), job.connect(), has_state=False)
    assert (round_.source, round_.receivers, round_.updates) == (None, (), 0)


def test_furthest_member_gives_the_state_to_those_behind_it() -> None:
    job = start_job(3)
    job.ready(1, updates=41)
    job.ready(2, updates=42)
    job.ready(3, updates=42)
    round_ = job.published
    assert (round_.source, round_.receivers, round_.updates) == (1, (0,), 42)


def test_member_whose_state_is_in_pieces_receives_it_even_with_more_updates() -> None:
    job = start_job(2)
    job.ready(1, updates=42, has_state=False)
    job.ready(2, updates=41)
    assert (job.published.source, job.published.receivers) == (1, (0,))


def test_newcomers_state_is_not_trusted_while_an_older_member_has_one() -> None:
    job = start_job(1)
    newcomer = job.connect()
    job.ready(newcomer, updates=99)
    job.ready(1, updates=5)
    assert (job.published.source, job.published.receivers) == (0, (1,))


def test_newcomer_with_equal_updates_receives_the_state_too() -> None:
    job = start_job(1)
    job.ready(job.connect(), updates=5)
    job.ready(1, updates=5)
    assert job.published.receivers == (1,)


def test_joining_is_announced_once_and_only_when_the_newcomer_is_ready() -> None:
    job = start_job(2)
    newcomer = job.connect()
    assert job.told(1) == []
    job.ready(newcomer)
    assert job.told(1) == job.told(2) == [Change("join")]
    second = job.connect()
    job.ready(second)
    assert not job.effects
    assert list_members(job.form(1, 2)) == [1, 2, newcomer, second]


def test_survivors_are_told_of_a_death_and_form_a_smaller_round() -> None:
    job = start_job(3)
    job.die(2)
    assert job.told(1) == job.told(3) == [Change("lost")]
    assert list_members(job.form(1, 3)) == [1, 3]
    assert job.published.number == 2


def test_member_that_comes_unasked_calls_the_others() -> None:
    job = start_job(2)
    job.ready(1)
    assert job.told(2) == [Change("regroup")]
    assert list_members(job.form(2)) == [1, 2]


def test_death_in_a_published_round_needs_new_reports() -> None:
    job = start_job(3)
    job.die(3)
    job.form(1, 2)
    job.ready(1, after=1)
    assert job.told(1) == [job.membership.round]
    job.die(2)
    assert job.told(1) == [Change("lost")]
    assert not job.rounds
    assert list_members(job.form(1)) == [1]
    assert job.published.number == 3


def test_late_report_of_an_older_round_is_answered_with_the_newest_round() -> None:
    job = start_job(2)
    job.form(1, 2)
    job.ready(1, after=1)
    assert job.effects == (Tell(1, job.membership.round),)
    job.ready(2)
    assert not job.rounds


def test_report_for_a_round_that_was_never_published_is_fenced() -> None:
    job = start_job(2)
    job.ready(1, after=7)
    assert job.effects[0] == Fence(1, "it is not in round 7")
    assert job.told(2) == [Change("lost")]


def test_second_hello_is_fenced() -> None:
    job = start_job(1)
    assert job.send(1, Hello("token", "node", 0))[0] == Fence(1, "it sent a second hello")


def test_heartbeat_is_answered_with_its_number() -> None:
    job = start_job(1)
    assert job.send(1, Heartbeat(77)) == (Tell(1, HeartbeatAnswer(77)),)


# --- expulsion ------------------------------------------------------------------------------------------------------


def test_silent_member_is_expelled_and_everything_it_sends_later_is_fenced() -> None:
    job = start_job(2, lost_after_s=3.0)
    assert Fence(2, "no heartbeat for 3 s") not in job.tick(3.0, alive=[1])
    assert Fence(2, "no heartbeat for 3 s") in job.tick(0.5, alive=[1])
    assert job.membership.find_member(2) is None
    for message in (Heartbeat(0), Ready(1, 0, True, "", 0), Leave(), Finish(1)):
        assert job.send(2, message) == (Fence(2, "it is not a member any more"),)
    assert list_members(job.form(1)) == [1]


def test_newcomer_that_is_still_being_built_may_be_silent() -> None:
    job = start_job(1)
    newcomer = job.connect()
    job.tick(60.0, alive=[1])
    assert job.membership.find_member(newcomer)
    job.ready(newcomer)
    assert job.tick(4.0, alive=[1])[-1] == Fence(newcomer, "no heartbeat for 3 s")


def test_second_member_from_a_place_replaces_the_first_as_after_an_expulsion() -> None:
    job = start_job(2)
    newer = job.connect(slot=1)
    reason = "another process has joined from its slot"
    assert job.effects == (Fence(2, reason), Tell(1, Change("lost")), Tell(newer, Welcome(newer, 3.0)))
    assert job.send(2, Heartbeat(0)) == (Fence(2, "it is not a member any more"),)
    assert job.die(2) == ()
    job.ready(newer, has_state=False)
    assert list_members(job.form(1, updates=7)) == [1, newer]
    assert (job.published.source, job.published.receivers) == (0, (1,))


def test_survivors_wait_for_a_process_that_has_replaced_another() -> None:
    job = start_job(2, wait_s=10.0)
    newer = job.connect(slot=1)
    job.ready(1)
    job.tick(9.0, alive=[1, newer])
    assert job.newest.number == 1
    assert list_members(job.form(newer)) == [1, newer]


def test_newcomer_is_replaced_without_a_word_to_the_others() -> None:
    job = start_job(1)
    older = job.connect(slot=1)
    job.ready(older)
    newer = job.connect(slot=1)
    assert job.effects[:-1] == (Fence(older, "another process has joined from its slot"),)
    assert job.told(newer) == [Welcome(newer, 3.0)]
    job.ready(1)
    assert list_members(job.published) == [1]


def test_replacing_the_only_member_is_a_loss_of_the_state() -> None:
    job = start_job(1)
    newer = job.connect(slot=0)
    assert job.effects[1] == AllLost()
    assert job.form(newer, has_state=False).source is None


def test_same_slot_of_another_node_is_another_place() -> None:
    job = start_job(1)
    newer = job.connect(slot=0, node="another")
    assert job.effects == (Tell(newer, Welcome(newer, 3.0)),)


def test_nobody_is_replaced_once_training_is_complete() -> None:
    job = start_job(2)
    job.send(1, Finish(1))
    job.connect(slot=1)
    assert job.effects == (Tell(3, Complete()),)


def test_nobody_is_expelled_for_time_in_which_the_service_did_not_run() -> None:
    job = start_job(2)
    job.now += 600.0
    assert job.handle(Ticked(job.now)) == ()
    assert job.tick(2.0) == []


# --- limits ---------------------------------------------------------------------------------------------------------


def test_survivors_wait_for_a_replacement_before_a_smaller_round() -> None:
    job = start_job(2, wait_s=10.0)
    job.die(2)
    job.ready(1)
    job.tick(9.5, alive=[1])
    assert job.newest.number == 1
    job.tick(0.5, alive=[1])
    assert list_members(job.newest) == [1]


def test_replacement_ends_the_wait() -> None:
    job = start_job(2, wait_s=10.0)
    job.die(2)
    job.ready(1)
    assert list_members(job.form(job.connect())) == [1, 3]
    job.ready(1)
    job.ready(3)
    assert list_members(job.published) == [1, 3]


def test_nobody_waits_for_the_replacement_of_one_that_leaves() -> None:
    job = start_job(2, wait_s=10.0)
    job.send(2, Leave())
    job.ready(2)
    job.ready(1)
    assert list_members(job.published) == [1]


def test_survivors_below_min_workers_wait_without_limit() -> None:
    job = start_job(2, min_workers=2)
    job.die(2)
    job.ready(1)
    job.tick(600.0, alive=[1])
    assert job.newest.number == 1
    assert list_members(job.form(job.connect())) == [1, 3]


def test_newcomer_above_max_workers_waits_as_a_standby_until_a_member_dies() -> None:
    job = start_job(2, max_workers=2, wait_s=10.0)
    standby = job.connect()
    job.ready(standby)
    assert not job.effects
    job.form(1, 2)
    job.die(1)
    assert list_members(job.form(2)) == [2, standby]


@pytest.mark.parametrize("wait_s", [0.0, 10.0])
def test_first_round_waits_for_all_workers_although_one_has_died(wait_s: float) -> None:
    job = Job(3, wait_s=wait_s)
    first, second = job.connect(), job.connect()
    job.ready(first)
    job.die(second)
    job.tick(60.0, alive=[first])
    assert job.membership.round is None
    assert list_members(job.form(job.connect(), job.connect())) == [first, 3, 4]


def test_death_of_a_newcomer_does_not_prolong_the_wait_after_all_members_were_lost() -> None:
    job = start_job(2, wait_s=10.0)
    job.die(1)
    job.die(2)
    first, second = job.connect(), job.connect()
    job.ready(first)
    job.tick(9.5, alive=[first])
    job.die(second)
    assert job.newest.number == 1
    job.tick(0.5, alive=[first])
    assert list_members(job.newest) == [first]


# --- leaving, losing everybody, finishing ---------------------------------------------------------------------------


def test_leaving_member_is_released_when_the_others_have_finished_the_update() -> None:
    job = start_job(3)
    job.send(2, Leave())
    assert job.told(1) == job.told(2) == [Change("leave")]
    job.ready(2, updates=1)
    job.ready(1, updates=1)
    assert not job.effects
    job.ready(3, updates=1)
    assert job.told(2) == [Release(save=False)]
    assert list_members(job.published) == [1, 3]
    assert job.die(2) == ()


def test_leaving_member_first_gives_its_state_to_a_newcomer() -> None:
    job = start_job(1)
    newcomer = job.connect()
    job.ready(newcomer, has_state=False)
    job.send(1, Leave())
    job.ready(1, updates=5)
    assert list_members(job.published) == [1, newcomer]
    assert (job.published.source, job.published.receivers) == (0, (1,))
    assert job.told(1)[1:] == job.told(newcomer)[1:] == [Change("leave")]
    job.ready(1, updates=6)
    job.ready(newcomer, updates=6)
    assert job.told(1) == [Release(save=False)]
    assert list_members(job.published) == [newcomer]


def test_last_member_to_leave_is_told_to_save() -> None:
    job = start_job(2)
    job.send(1, Leave())
    job.send(2, Leave())
    job.ready(1, updates=5)
    job.ready(2, updates=5)
    assert (job.told(1), job.told(2)) == ([Release(save=True)], [Release(save=False)])
    assert job.effects[-1] == AllLost()


def test_newcomer_may_leave_at_once() -> None:
    job = start_job(1)
    newcomer = job.connect()
    assert job.send(newcomer, Leave()) == (Tell(newcomer, Release(save=False)),)


def test_after_the_death_of_all_members_a_new_round_begins_from_the_checkpoint() -> None:
    job = start_job(2)
    job.die(1)
    assert job.die(2) == (AllLost(),)
    round_ = job.form(job.connect(), has_state=False)
    assert (round_.number, round_.source) == (2, None)


def test_service_ends_when_every_member_has_finished() -> None:
    job = start_job(2)
    standby = job.connect()
    job.send(1, Finish(1))
    assert job.told(1) == job.told(standby) == [Complete()]
    assert Ended() not in job.effects
    assert job.send(2, Finish(1)) == (Tell(2, Complete()), Ended())
    late = job.connect()
    assert job.told(late) == [Complete()]


@pytest.mark.parametrize("reports", [False, True])
def test_death_after_the_first_finish_is_no_loss(reports: bool) -> None:
    """The last one may also find its collective broken, since the others have left it."""
    job = start_job(3)
    job.send(1, Finish(1))
    assert job.die(2) == ()
    if reports:
        job.ready(3)
        assert job.effects == (Tell(3, Complete()), Ended())
    else:
        assert job.die(3) == (Ended(),)


def test_only_a_member_of_the_newest_round_can_finish() -> None:
    job = start_job(1)
    newcomer = job.connect()
    assert job.send(newcomer, Finish(0)) == (Fence(newcomer, "it is not in round 0"),)
    assert not job.membership.complete
