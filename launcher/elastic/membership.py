"""Which workers take part in which round: a pure state machine without I/O and without a clock.

A round is a process group: members with ranks, formed by all of them together. `Membership.handle` takes an event, with
the time at which it happened, and returns the next state and what is to be done. `service` feeds it from sockets.

What holds in every history of events:

- Round numbers increase strictly. All members of a round get the same `Round`.
- A round is published once every member of the round before has reported for it, or is gone. A report names the newest
  round that the member knows of, so that a late one is never taken for a report for a later round.
- The order of the ranks is the order of the round before, followed by the newcomers by node and slot.
- A place, a slot of a node, has one member: the newest that connected from there. An older one is fenced.
- A member that is silent for `lost_after_s` is fenced: it is not a member any more, and its process must not act.
- The state comes from the member with the most finished updates, and from a newcomer only if no older member has it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.elastic.events import (
    AllLost,
    Connected,
    Disconnected,
    Effect,
    Ended,
    Event,
    Fence,
    Tell,
    Ticked,
)
from launcher.elastic.members import Member, find_furthest, make_round
from launcher.elastic.messages import (
    Change,
    ChangeReason,
    Complete,
    Finish,
    Heartbeat,
    HeartbeatAnswer,
    Hello,
    Leave,
    Release,
    Request,
    Round,
    Welcome,
)

__all__ = ["Membership", "MembershipLimits"]


@dataclass(frozen=True)
class MembershipLimits:
    """What a round needs. `wait_s` is 0 where the batch does not depend on the number of workers (batch=hold).

    The first round waits for `expected` workers without limit. After a death in a round a smaller one waits `wait_s`
    seconds for a replacement. Below `min_workers` there is no round; newcomers above `max_workers` wait until a member
    is gone.
    """

    expected: int = 1
    min_workers: int = 1
    max_workers: int | None = None
    wait_s: float = 0.0
    lost_after_s: float = 3.0


@dataclass(frozen=True)
class Membership:
    """The members of a job and its newest round; see the module.

    `members` begins with the members of the newest round in the order of their ranks. `wanted` is the world size to
    wait for, until `deadline`; without one there is no limit to the wait. `announced` is whether the members have been
    told to come to the next round.
    """

    limits: MembershipLimits
    now: float = 0.0
    ticked_at: float = 0.0
    round: Round | None = None
    members: tuple[Member, ...] = ()
    wanted: int = 1
    deadline: float | None = None
    announced: bool = False
    complete: bool = False
    ended: bool = False

    @classmethod
    def start(cls, limits: MembershipLimits, now: float) -> Membership:
        """The membership of a job that nobody has joined yet."""
        return cls(limits, now, ticked_at=now, wanted=limits.expected).limit_wanted()

    def handle(self, event: Event) -> tuple[Membership, tuple[Effect, ...]]:
        """Return the state after an event, and its effects in the order in which they are to be carried out."""
        changed, effects = replace(self, now=max(self.now, event.at))._apply(event)
        settled, further = changed._settle()
        return settled, effects + further

    def find_member(self, number: int) -> Member | None:
        """Return the living member with this number."""
        return next((member for member in self.members if member.number == number), None)

    @property
    def in_round(self) -> tuple[Member, ...]:
        """The living members of the newest round, in the order of their ranks; all of them must come to the next."""
        return tuple(member for member in self.members if not member.is_newcomer)

    @property
    def waiting_newcomers(self) -> tuple[Member, ...]:
        """The members that are ready to join, in the order of their arrival."""
        return tuple(member for member in self.members if member.is_newcomer and member.report is not None)

    def limit_wanted(self) -> Membership:
        """Wait for no more workers than may take part, and for at least one."""
        most = self.wanted if self.limits.max_workers is None else min(self.wanted, self.limits.max_workers)
        return replace(self, wanted=max(1, most))

    # --- events -----------------------------------------------------------------------------------------------------

    def _apply(self, event: Event) -> tuple[Membership, tuple[Effect, ...]]:
        if isinstance(event, Connected):
            return self._connect(event)
        if isinstance(event, Ticked):
            return self._expel_silent_members()
        if isinstance(event, Disconnected):
            return self._remove(event.member)
        member = self.find_member(event.member)
        if member is None:
            return self, (Fence(event.member, "it is not a member any more"),)
        heard = replace(member, heard_at=self.now)
        return self._put(heard)._receive(heard, event.message)

    def _connect(self, event: Connected) -> tuple[Membership, tuple[Effect, ...]]:
        if self.complete:
            return self, (Tell(event.member, Complete()),)
        left, effects = self._clear_place(event.node, event.slot)
        member = Member(event.member, event.node, event.slot, heard_at=self.now)
        welcome = Tell(member.number, Welcome(member.number, self.limits.lost_after_s))
        return replace(left, members=(*left.members, member)), (*effects, welcome)

    def _clear_place(self, node: str, slot: int) -> tuple[Membership, tuple[Effect, ...]]:
        """Fence the member of a place that a newer process has: the death of the older one was not noticed yet."""
        older = next((each for each in self.members if (each.node, each.slot) == (node, slot)), None)
        return (self, ()) if older is None else self._fence(older, "another process has joined from its slot")

    def _receive(self, member: Member, message: Request) -> tuple[Membership, tuple[Effect, ...]]:
        if isinstance(message, Heartbeat):
            return self, (Tell(member.number, HeartbeatAnswer(message.number)),)
        if isinstance(message, Leave):
            return self._accept_leave(member)
        if isinstance(message, Hello):
            return self._fence(member, "it sent a second hello")
        if message.after < member.round and self.round is not None:
            return self, (Tell(member.number, self.round),)  # sent before this round reached it
        if message.after > member.round or (isinstance(message, Finish) and member.is_newcomer):
            return self._fence(member, f"it is not in round {message.after}")
        if isinstance(message, Finish):
            return replace(self._drop(member), complete=True), (Tell(member.number, Complete()),)
        return self._put(replace(member, report=message)), ()

    def _accept_leave(self, member: Member) -> tuple[Membership, tuple[Effect, ...]]:
        """Do without a member from the next round on; nobody waits for its replacement."""
        if member.leaving or self.complete:
            return self, ()
        counted = member.round > 0 or not self.in_round
        fewer = replace(self, wanted=self.wanted - counted).limit_wanted()
        if member.is_newcomer:
            return fewer._drop(member), (Tell(member.number, Release(save=False)),)
        return fewer._put(replace(member, leaving=True)), ()

    def _expel_silent_members(self) -> tuple[Membership, tuple[Effect, ...]]:
        """Fence all members that were silent for too long.

        A newcomer that is still being built is not judged: nobody waits for it, and an import can hold the interpreter
        for seconds. After a gap between ticks it was this process that did not run, so everybody gets more time.
        """
        gap_s = self.now - self.ticked_at
        ticked = replace(self, ticked_at=self.now)
        if gap_s > self.limits.lost_after_s / 2:
            return replace(ticked, members=tuple(replace(each, heard_at=self.now) for each in self.members)), ()
        silent = [each for each in self.members if self.now - each.heard_at > self.limits.lost_after_s]
        effects: tuple[Effect, ...] = ()
        for member in silent:
            if not member.is_newcomer or member.report is not None:
                ticked, more = ticked._fence(member, f"no heartbeat for {self.limits.lost_after_s:g} s")
                effects += more
        return ticked, effects

    def _fence(self, member: Member, reason: str) -> tuple[Membership, tuple[Effect, ...]]:
        removed, effects = self._remove(member.number)
        return removed, (Fence(member.number, reason), *effects)

    def _remove(self, number: int) -> tuple[Membership, tuple[Effect, ...]]:
        """Continue without a member that has died; the other members of its round cannot finish their update.

        A newcomer's death changes no deadline: the first round has none, and a later one does not wait for newcomers.
        """
        member = self.find_member(number)
        if member is None:
            return self, ()
        left = self._drop(member)
        if self.complete or member.is_newcomer:
            return left, ()
        if not member.leaving:
            left = replace(left, deadline=self.now + self.limits.wait_s)
        told = tuple(Tell(each.number, Change("lost")) for each in left.in_round if each.report is None)
        left, lost = left._begin_again_if_all_left(self)
        return replace(left, announced=bool(left.in_round)), told + lost

    def _begin_again_if_all_left(self, before: Membership) -> tuple[Membership, tuple[Effect, ...]]:
        """After the last member of a round is gone, wait for workers as at the start, but no longer than `wait_s`."""
        if self.in_round or not before.in_round:
            return self, ()
        deadline = self.now + self.limits.wait_s
        return replace(self, wanted=self.limits.expected, deadline=deadline).limit_wanted(), (AllLost(),)

    # --- rounds -----------------------------------------------------------------------------------------------------

    def _settle(self) -> tuple[Membership, tuple[Effect, ...]]:
        """Do what the state now allows: end, call the members to a round, release those who leave, publish a round."""
        if self.complete:
            return self._wind_up()
        if any(member.report is None for member in self.in_round):
            return self._announce()
        released, effects = self._release_leavers()
        published, further = released._publish()
        return published, effects + further

    def _wind_up(self) -> tuple[Membership, tuple[Effect, ...]]:
        """Send everybody home who waits for a round; end once nobody trains any more."""
        if self.ended:
            return self, ()
        training = tuple(each for each in self.members if not each.is_newcomer and each.report is None)
        told = tuple(Tell(each.number, Complete()) for each in self.members if each not in training)
        return replace(self, members=training, ended=not training), told + (() if training else (Ended(),))

    def _announce(self) -> tuple[Membership, tuple[Effect, ...]]:
        """Tell the members of the round once that another one is to be formed, if there is a reason."""
        reason = None if self.announced else self._find_reason()
        if reason is None:
            return self, ()
        told = tuple(Tell(each.number, Change(reason)) for each in self.in_round if each.report is None)
        return replace(self, announced=True), told

    def _find_reason(self) -> ChangeReason | None:
        if any(member.report is not None for member in self.in_round):
            return "regroup"
        if any(member.leaving for member in self.in_round):
            return "leave"
        return "join" if self._choose_newcomers(self._list_stayers()) else None

    def _release_leavers(self) -> tuple[Membership, tuple[Effect, ...]]:
        """Let the leaving members go, now that all have finished the update; one may have to give its state first."""
        keeper = self._find_keeper()
        leavers = [member for member in self.in_round if member.leaving and member != keeper]
        left = self
        for member in leavers:
            left = left._drop(member)
        saver = None if find_furthest(left.in_round) else find_furthest(leavers)
        told = tuple(Tell(each.number, Release(save=each == saver)) for each in leavers)
        left, lost = left._begin_again_if_all_left(self)
        return left, told + lost

    def _find_keeper(self) -> Member | None:
        """Return the leaving member that must take part in one more round, since no staying one is as far ahead."""
        furthest = find_furthest((*self._list_stayers(), *self.in_round))
        if furthest is None or not furthest.leaving:
            return None
        chosen = self._choose_members(furthest)
        return furthest if len(chosen) > 1 and self._suffices(len(chosen)) else None

    def _publish(self) -> tuple[Membership, tuple[Effect, ...]]:
        """Publish the next round, if there are enough members for it."""
        chosen = self._choose_members(next((each for each in self.in_round if each.leaving), None))
        if not self._suffices(len(chosen)):
            return self, ()
        round_ = make_round(1 if self.round is None else self.round.number + 1, chosen)
        placed = tuple(replace(each, round=round_.number, report=None) for each in chosen)
        others = tuple(each for each in self.members if each not in chosen)
        wanted = sum(not each.leaving for each in chosen)
        published = replace(self, round=round_, members=placed + others, wanted=wanted, deadline=None, announced=False)
        announced, effects = published.limit_wanted()._announce()
        return announced, tuple(Tell(each.number, round_) for each in chosen) + effects

    def _suffices(self, count: int) -> bool:
        """Whether so many members may form a round now."""
        waited = self.deadline is not None and self.now >= self.deadline
        return count >= max(1, self.limits.min_workers) and (count >= self.wanted or waited)

    def _list_stayers(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.is_stayer)

    def _choose_members(self, keeper: Member | None) -> tuple[Member, ...]:
        """The members of the next round by rank: those of the round before, then newcomers by their place."""
        staying = tuple(member for member in self.in_round if member.is_stayer or member == keeper)
        newcomers = self._choose_newcomers(staying)
        return (*staying, *sorted(newcomers, key=lambda member: (member.node, member.slot)))

    def _choose_newcomers(self, staying: tuple[Member, ...]) -> tuple[Member, ...]:
        most = self.limits.max_workers
        return self.waiting_newcomers[: None if most is None else max(0, most - len(staying))]

    def _put(self, member: Member) -> Membership:
        """Replace the member that has the same number."""
        members = tuple(member if each.number == member.number else each for each in self.members)
        return replace(self, members=members)

    def _drop(self, member: Member) -> Membership:
        return replace(self, members=tuple(each for each in self.members if each.number != member.number))
