"""A model of a whole job around the membership state machine: trainers, their process group, and messages in flight.

A trainer reads its messages when it likes, so that everything can happen between the sending of a message and its
effect. A collective needs all trainers of a round; if one of them has died or has left the group, each of the others
finds its collective broken, with the update in flight finished or not. `perform` checks every round that is published.

Only what can still matter is kept, so that equal situations are found: processes that are gone are forgotten and the
others renumbered, the newest round has always the same number, and updates are counted from the one in which a round
was formed. An update without a fault changes nothing and is no step of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from launcher.elastic.events import AllLost, Connected, Disconnected, Effect, Event, Fence, Received, Tell, Ticked
from launcher.elastic.members import Member
from launcher.elastic.membership import Membership, MembershipLimits
from launcher.elastic.messages import (
    Answer,
    Change,
    Complete,
    Fenced,
    Finish,
    Heartbeat,
    Leave,
    Ready,
    Release,
    Request,
    Round,
    Welcome,
)

__all__ = ["FAULTS", "Action", "JobModel", "Trainer", "World", "ends_well"]

#: What happens to a job, in contrast to what its processes do by themselves.
FAULTS = ("spawn", "replace", "die", "stop", "leave")
FIRST_PORT = 1000
FORMED, NEWEST = 1, 10  # the updates of a newly formed round, and the number of the newest round
CALL = Change("regroup")  # stands for all changes: to the model it does not matter why there is another round
FENCED = Fenced("")


class Trainer(NamedTuple):
    """A trainer: what its process does (`phase`) and what it knows. `dead` and `stopped` ones do nothing any more.

    `round` is the number of the newest round that it has read, and `place` the index of that message. `change` is
    whether it has heard of a change since.
    """

    number: int
    phase: str = "building"  # then waiting, forming, working, coming (to the next round), in turn
    life: str = "alive"  # or stopped, dead (but its connection is not closed yet), gone
    round: int = 0
    place: int = -1
    updates: int = 0
    has_state: bool = False
    change: bool = False
    leaving: bool = False
    inbox: tuple[int, ...] = ()


class World(NamedTuple):
    """A job at one moment: a state of the membership, by its index in the model, and how much may still happen."""

    membership: int
    trainers: tuple[Trainer, ...]
    births: int
    deaths: int
    leaves: int


#: The name of an action, the index of the trainer that it concerns, and a choice where it can go either way.
Action = tuple[str, int, bool]


class JobModel:
    """The transitions between the states of a job; states of the membership and messages are kept once."""

    def __init__(
        self,
        limits: MembershipLimits,
        *,
        most_living: int = 3,
        stops: bool = False,
        finishes: bool = False,
        replaces: bool = False,
    ) -> None:
        self.limits = limits
        self.most_living = most_living
        self.stops = stops
        self.finishes = finishes
        self.replaces = replaces
        self.leaves = 0
        self.memberships: list[Membership] = []
        self.messages: list[Answer] = []
        self._membership_ids: dict[Membership, int] = {}
        self._message_ids: dict[Answer, int] = {}
        self._shortened: dict[tuple[int, int, tuple[int, ...]], int] = {}
        self._renamed: dict[tuple[int, int, tuple[int, ...]], int] = {}
        self._handled: dict[tuple[int, Event], tuple[int, tuple[Effect, ...]]] = {}

    def start(self, workers: int, *, births: int, deaths: int, leaves: int = 0) -> World:
        """A job whose first workers have just connected."""
        self.leaves = leaves
        world = World(self._keep(Membership.start(self.limits, 0.0)), (), births + workers, deaths, leaves)
        for _ in range(workers):
            world = self.perform(world, ("spawn", 0, False))
        return world

    # --- actions ----------------------------------------------------------------------------------------------------

    def list_actions(self, world: World) -> list[Action]:
        """Return everything that can happen next."""
        living = sum(trainer.life in ("alive", "stopped") for trainer in world.trainers)
        actions = [("spawn", 0, False)] if world.births and living < self.most_living else []
        deadline = self.memberships[world.membership].deadline
        if deadline is not None and deadline > 0:
            actions.append(("wait_over", 0, False))
        for index, trainer in enumerate(world.trainers):
            if self.replaces and self._can_be_replaced(world, trainer):
                actions.append(("replace", index, False))
            actions += [(name, index, choice) for name, choice in self._list_own_actions(world, trainer)]
        return actions

    def _can_be_replaced(self, world: World, trainer: Trainer) -> bool:
        """Whether another process can connect from its slot: that one counts as a birth, and this one as a death."""
        deaths = world.deaths if trainer.life == "alive" else 1
        return bool(world.births and deaths) and self._is_member(world, trainer)

    def _is_member(self, world: World, trainer: Trainer) -> bool:
        return self.memberships[world.membership].find_member(trainer.number) is not None

    def _list_own_actions(self, world: World, trainer: Trainer) -> Iterator[tuple[str, bool]]:
        if trainer.life == "dead":
            yield "disconnect", False
        if trainer.life == "stopped":
            yield "expel", False
        if trainer.life == "alive":
            yield from self._list_faults(world, trainer)
            yield from self._list_messages(trainer)
            if trainer.phase in ("forming", "working"):
                yield from self._list_group_actions(world, trainer)

    def _list_faults(self, world: World, trainer: Trainer) -> Iterator[tuple[str, bool]]:
        if world.deaths:
            yield "die", False
            if self.stops and trainer.phase != "building":  # nobody waits for it, so it is not judged
                yield "stop", False
        if world.leaves and not trainer.leaving and self._is_member(world, trainer):
            yield "leave", False

    def _list_messages(self, trainer: Trainer) -> Iterator[tuple[str, bool]]:
        if trainer.inbox:
            yield "read", False
        if trainer.phase in ("building", "coming"):
            yield "report", False
        if trainer.phase == "done":
            yield "say_done", False

    def _list_group_actions(self, world: World, trainer: Trainer) -> Iterator[tuple[str, bool]]:
        peers = self._list_peers(world, trainer)
        if any(has_left(peer, trainer) for peer in peers):
            yield "break", False
            yield "break", True  # the work in flight was finished on this rank
        elif trainer.number == peers[0].number and all(peer.phase == trainer.phase for peer in peers):
            if trainer.phase == "forming":
                yield "form", False
            elif any(peer.change for peer in peers):
                yield "update", False
            if trainer.phase == "working" and self.finishes:
                yield "finish", False

    def perform(self, world: World, action: Action) -> World:
        """Return the state after an action; every round that is published on the way is checked."""
        name, index, choice = action
        if name == "spawn":
            return self._connect(world, len(world.trainers) + 1)
        if name == "wait_over":
            return self._shorten(self._handle(world, Ticked(self.limits.wait_s)))
        trainer = world.trainers[index]
        return self._shorten(getattr(self, f"_do_{name}")(world, trainer, choice))

    def _connect(self, world: World, slot: int) -> World:
        number = len(world.trainers) + 1
        world = world._replace(births=world.births - 1, trainers=(*world.trainers, Trainer(number)))
        return self._handle(world, Connected(0.0, number, "node", slot))

    def _do_replace(self, world: World, trainer: Trainer, _: bool) -> World:
        """Another process connects from its slot. If it is alive all the same, it goes on until it is told."""
        older = self.memberships[world.membership].find_member(trainer.number)
        assert older is not None
        world = world._replace(deaths=world.deaths - (trainer.life == "alive"))
        return self._connect(world, older.slot)

    def _do_disconnect(self, world: World, trainer: Trainer, _: bool) -> World:
        return self._handle(put(world, forget(trainer)), Disconnected(0.0, trainer.number))

    def _do_expel(self, world: World, trainer: Trainer, _: bool) -> World:
        """Everybody else is heard of until the silent one is expelled; then it wakes up and is told so."""
        world = put(world, forget(trainer))
        step_s = self.limits.lost_after_s * 0.4
        membership, effects = self.memberships[world.membership], []
        for at in (step_s, 2 * step_s, 3 * step_s):
            for other in world.trainers:
                if (
                    other.life in ("alive", "stopped")
                    and other.number != trainer.number
                    and membership.find_member(other.number)
                ):
                    membership, _none = membership.handle(Received(at, other.number, Heartbeat(0)))
            membership, more = membership.handle(Ticked(at))
            effects += more
        if self.memberships[world.membership].find_member(trainer.number):  # not one that was released and stopped
            assert Fence(trainer.number, f"no heartbeat for {self.limits.lost_after_s:g} s") in effects
        late = Received(3 * step_s, trainer.number, make_report(trainer))
        after, answers = membership.handle(late)
        assert after == membership
        assert [type(answer) for answer in answers] == [Fence]
        return self._deliver(world, membership, tuple(effects))

    def _do_die(self, world: World, trainer: Trainer, _: bool) -> World:
        """Its connection is closed some time later; if it waited, a round may still count on it."""
        dead = trainer if trainer.phase == "waiting" else Trainer(trainer.number)
        return put(world, dead._replace(life="dead", place=-1, inbox=()))._replace(deaths=world.deaths - 1)

    def _do_stop(self, world: World, trainer: Trainer, _: bool) -> World:
        return put(world, trainer._replace(life="stopped", inbox=()))._replace(deaths=world.deaths - 1)

    def _do_leave(self, world: World, trainer: Trainer, _: bool) -> World:
        world = put(world, trainer._replace(leaving=True))._replace(leaves=world.leaves - 1)
        return self._send(world, trainer, Leave())

    def _do_report(self, world: World, trainer: Trainer, _: bool) -> World:
        waiting = self._heed_calls(trainer)._replace(phase="waiting", place=-1)
        return self._send(put(world, waiting), trainer, make_report(trainer))

    def _heed_calls(self, trainer: Trainer) -> Trainer:
        """A trainer that is on its way to a round, so that no call to it matters any more."""
        left = tuple(index for index in trainer.inbox if self.messages[index] != CALL)
        return trainer._replace(change=False, inbox=left)

    def _do_finish(self, world: World, trainer: Trainer, _: bool) -> World:
        """The last update was finished, by all together; each says so when it likes."""
        for peer in self._list_peers(world, trainer):
            world = put(world, self._heed_calls(peer)._replace(phase="done", place=-1))
        return world

    def _do_say_done(self, world: World, trainer: Trainer, _: bool) -> World:
        return self._send(put(world, trainer._replace(phase="waiting")), trainer, Finish(trainer.round))

    def _do_break(self, world: World, trainer: Trainer, finished: bool) -> World:
        """A collective fails; if the group was being formed, the state was received or is now in pieces."""
        if trainer.phase == "working":
            trainer = trainer._replace(updates=trainer.updates + finished)
        else:
            round_ = self._read_round(trainer)
            if round_.find_rank(trainer.number) in round_.receivers:
                trainer = trainer._replace(updates=round_.updates, has_state=finished)
        return self._do_report(world, trainer, False)

    def _do_form(self, world: World, trainer: Trainer, _: bool) -> World:
        """The members meet, and those that need it receive the state. From here on updates are counted anew."""
        round_ = self._read_round(trainer)
        for rank, peer in enumerate(self._list_peers(world, trainer)):
            if rank not in round_.receivers and round_.source is not None:
                assert (peer.updates, peer.has_state) == (round_.updates, True)
            world = put(world, peer._replace(phase="working", updates=FORMED, has_state=True))
        return world

    def _do_update(self, world: World, trainer: Trainer, _: bool) -> World:
        peers = self._list_peers(world, trainer)
        assert len({peer.updates for peer in peers}) == 1
        for peer in peers:
            coming = self._heed_calls(peer)._replace(phase="coming", updates=peer.updates + 1, place=-1)
            world = put(world, coming)
        return world

    def _do_read(self, world: World, trainer: Trainer, _: bool) -> World:
        place = trainer.inbox[0]
        message = self.messages[place]
        trainer = trainer._replace(inbox=trainer.inbox[1:])
        if isinstance(message, Round):
            self._check_late_report(world, trainer)
            assert message.number > trainer.round, "a round reached a member twice"
            assert trainer.phase == "waiting"
            return put(world, trainer._replace(phase="forming", round=message.number, place=place, change=False))
        if isinstance(message, Change):
            return put(world, trainer._replace(change=True))
        assert isinstance(message, Release | Complete | Fenced)
        return self._handle(put(world, forget(trainer)), Disconnected(0.0, trainer.number))

    def _check_late_report(self, world: World, trainer: Trainer) -> None:
        """If an impatient trainer reports again while a round is on its way to it, it is only told the round again."""
        membership = self.memberships[world.membership]
        if membership.find_member(trainer.number):
            after, effects = membership.handle(Received(0.0, trainer.number, make_report(trainer)))
            assert (after, effects) == (membership, (Tell(trainer.number, membership.round),)), "a late report counts"

    # --- the membership ---------------------------------------------------------------------------------------------

    def _send(self, world: World, trainer: Trainer, message: Request) -> World:
        return self._handle(world, Received(0.0, trainer.number, message))

    def _handle(self, world: World, event: Event) -> World:
        key = (world.membership, event)
        if key not in self._handled:
            membership, effects = self.memberships[world.membership].handle(event)
            self._handled[key] = (self._keep(membership), effects)
        kept, effects = self._handled[key]
        return self._deliver(world, self.memberships[kept], effects, kept)

    def _deliver(
        self, world: World, membership: Membership, effects: tuple[Effect, ...], kept: int | None = None
    ) -> World:
        before = self.memberships[world.membership]
        check_rounds(before, membership, effects, world.trainers, self.limits)
        check_departures(before, membership, effects, world.trainers)
        check_places(membership)
        if before.round is None and membership.round is not None:
            assert membership.round.world_size >= self.count_first_workers(world), "the first round did not wait"
        for effect in effects:
            if isinstance(effect, Fence) or (isinstance(effect, Tell) and not isinstance(effect.message, Welcome)):
                trainer = world.trainers[effect.member - 1]
                index = self._keep_message(get_message(effect))
                if trainer.life == "alive" and not self._is_ignored(index, trainer):
                    world = put(world, trainer._replace(inbox=(*trainer.inbox, index)))
        return world._replace(membership=self._keep(membership) if kept is None else kept)

    def count_first_workers(self, world: World) -> int:
        """How many workers the first round needs: those that are expected, without those that have left before it."""
        most = self.limits.expected if self.limits.max_workers is None else self.limits.max_workers
        return max(1, min(self.limits.expected, most) - (self.leaves - world.leaves))

    def _is_ignored(self, index: int, trainer: Trainer) -> bool:
        """Whether a message changes nothing: it calls a trainer that is on its way, or has been called already.

        Nor does it matter to be fenced to one that has yet to read how its membership has ended.
        """
        if self.messages[index] == FENCED:
            return any(isinstance(self.messages[each], Release | Complete | Fenced) for each in trainer.inbox)
        if self.messages[index] != CALL:
            return False
        known = trainer.change or trainer.phase not in ("forming", "working")
        return trainer.inbox[-1] == index if trainer.inbox else known

    # --- what is kept -----------------------------------------------------------------------------------------------

    def _keep_message(self, message: Answer) -> int:
        index = self._message_ids.setdefault(message, len(self.messages))
        self.messages += [message] if index == len(self.messages) else []
        return index

    def _keep(self, membership: Membership) -> int:
        """Return the index of a state, whose times are made relative to its own."""
        deadline = membership.deadline
        if deadline is not None:
            deadline = self.limits.wait_s if deadline > membership.now else 0.0
        members = tuple(replace(member, heard_at=0.0) for member in membership.members)
        round_ = membership.round and strip_round(membership.round)
        relative = replace(membership, now=0.0, ticked_at=0.0, deadline=deadline, members=members, round=round_)
        index = self._membership_ids.setdefault(relative, len(self.memberships))
        self.memberships += [relative] if index == len(self.memberships) else []
        return index

    def _shorten(self, world: World) -> World:
        """Forget the processes that are gone, renumber the others, and give the newest round its usual number."""
        newest = self.memberships[world.membership].round
        shift = NEWEST - newest.number if newest else 0
        if not shift and all(trainer.life != "gone" for trainer in world.trainers):
            return world
        left = [trainer for trainer in world.trainers if trainer.life != "gone"]
        numbers = {trainer.number: new for new, trainer in enumerate(left, 1)}
        key = (world.membership, shift, tuple(numbers))
        if key not in self._shortened:
            self._shortened[key] = self._keep(rename_membership(self.memberships[world.membership], numbers, shift))
        trainers = tuple(self._rename_trainer(trainer, numbers, shift) for trainer in left)
        return world._replace(membership=self._shortened[key], trainers=trainers)

    def _rename_trainer(self, trainer: Trainer, numbers: Mapping[int, int], shift: int) -> Trainer:
        return trainer._replace(
            number=numbers[trainer.number],
            round=trainer.round and trainer.round + shift,
            place=-1 if trainer.place < 0 else self._rename_message(trainer.place, numbers, shift),
            inbox=tuple(self._rename_message(index, numbers, shift) for index in trainer.inbox),
        )

    def _rename_message(self, index: int, numbers: Mapping[int, int], shift: int) -> int:
        message = self.messages[index]
        if not isinstance(message, Round):
            return index
        key = (index, shift, tuple(numbers))
        if key not in self._renamed:
            self._renamed[key] = self._keep_message(rename_round(message, numbers, shift))
        return self._renamed[key]

    def _read_round(self, trainer: Trainer) -> Round:
        """Return the newest round that a trainer has read."""
        round_ = self.messages[trainer.place]
        assert isinstance(round_, Round)
        return round_

    def _list_peers(self, world: World, trainer: Trainer) -> list[Trainer]:
        """Return the trainers of a trainer's round by rank, itself included."""
        members = [member.member for member in self._read_round(trainer).members]
        return [world.trainers[number - 1] if number else Trainer(0, life="gone") for number in members]


def ends_well(model: JobModel, world: World) -> bool:
    """Whether, where nothing more happens, all living trainers work in one round, or are done, or are too few."""
    living = [trainer for trainer in world.trainers if trainer.life == "alive"]
    working = [trainer for trainer in living if trainer.phase == "working"]
    membership = model.memberships[world.membership]
    if membership.complete:
        return membership.ended and not living
    if any(trainer.leaving or trainer.phase not in ("working", "waiting") for trainer in living):
        return False
    round_ = membership.round
    fewest = model.limits.min_workers if round_ else max(model.limits.min_workers, model.count_first_workers(world))
    if len(living) < fewest or not living:
        return not working
    return (
        round_ is not None
        and len(working) == min(len(living), model.limits.max_workers or len(living))
        and {trainer.number for trainer in working} == {member.member for member in round_.members}
        and {trainer.round for trainer in working} == {round_.number}
    )


def strip_round(round_: Round) -> Round:
    """A round without what only its members need."""
    members = tuple(replace(member, updates=0, has_state=True) for member in round_.members)
    return replace(round_, members=members, source=None, receivers=(), port=0)


def rename_round(round_: Round, numbers: Mapping[int, int], shift: int) -> Round:
    """Give the members of a round new numbers, 0 if they are gone."""
    renamed = [numbers.get(member.member, 0) for member in round_.members]
    members = tuple(
        replace(member, member=number, slot=number) for member, number in zip(round_.members, renamed, strict=True)
    )
    port = round_.port and FIRST_PORT + renamed[0]
    return replace(round_, number=round_.number + shift, members=members, port=port)


def rename_membership(membership: Membership, numbers: Mapping[int, int], shift: int) -> Membership:
    members = tuple(rename_member(member, numbers[member.number], shift) for member in membership.members)
    round_ = membership.round and rename_round(membership.round, numbers, shift)
    return replace(membership, members=members, round=round_)


def rename_member(member: Member, number: int, shift: int) -> Member:
    round_ = member.round and member.round + shift
    report = member.report and replace(member.report, after=round_, port=FIRST_PORT + number)
    return replace(member, number=number, slot=number, round=round_, report=report)


def put(world: World, trainer: Trainer) -> World:
    index = trainer.number - 1
    return world._replace(trainers=(*world.trainers[:index], trainer, *world.trainers[index + 1 :]))


def forget(trainer: Trainer) -> Trainer:
    """A trainer that is no member any more: nothing of it matters to what can still happen."""
    return Trainer(trainer.number, life="gone")


def make_report(trainer: Trainer) -> Ready:
    port = FIRST_PORT + trainer.number
    return Ready(trainer.round, trainer.updates, trainer.has_state, host="node", port=port)


def has_left(peer: Trainer, trainer: Trainer) -> bool:
    """Whether a trainer finds its collectives with a peer broken."""
    if peer.life != "alive" or peer.round > trainer.round:
        return True
    return peer.round == trainer.round and peer.phase in ("waiting", "coming")


def check_rounds(
    before: Membership,
    after: Membership,
    effects: tuple[Effect, ...],
    trainers: tuple[Trainer, ...],
    limits: MembershipLimits,
) -> None:
    """Check everything that must hold of a round when it is published."""
    told = [effect for effect in effects if isinstance(effect, Tell) and isinstance(effect.message, Round)]
    if not told:
        assert after.round == before.round or (after.round and before.round == strip_round(after.round))
        return
    round_ = told[0].message
    assert isinstance(round_, Round)
    assert {effect.message for effect in told} == {round_}, "members of one round were told different ones"
    assert after.round is not None
    assert strip_round(after.round) == strip_round(round_)
    assert round_.number == (before.round.number if before.round else 0) + 1
    numbers = [member.member for member in round_.members]
    assert sorted(effect.member for effect in told) == sorted(numbers)
    assert len(set(numbers)) == len(numbers), "a member has two ranks"
    assert max(1, limits.min_workers) <= len(numbers) <= (limits.max_workers or len(numbers))
    assert round_.port == FIRST_PORT + numbers[0]
    chosen = [trainers[number - 1] for number in numbers]
    leaving = [rank for rank, trainer in enumerate(chosen) if trainer.leaving]
    assert leaving in ([], [round_.source]), "a leaving member is in a round that does not need its state"
    for trainer, member in zip(chosen, round_.members, strict=True):
        assert trainer.phase == "waiting", "a member is in a round that it has not reported for"
        assert (member.updates, member.has_state) == (trainer.updates, trainer.has_state)
    check_order(before.round, numbers)
    check_source(round_, chosen, [each for each in trainers if before.find_member(each.number)])


def check_departures(
    before: Membership, after: Membership, effects: tuple[Effect, ...], trainers: tuple[Trainer, ...]
) -> None:
    """Check whom the membership lets go, and that it says when nobody with the training state is left."""
    remaining = [trainers[each.number - 1] for each in before.in_round if after.find_member(each.number)]
    lost = bool(before.in_round) and not remaining and not after.complete
    assert effects.count(AllLost()) == lost, "it is not said whether all members were lost"
    releases = {each.member: each.message for each in effects if isinstance(each, Tell) and is_release(each.message)}
    if not any(member.number in releases for member in before.in_round):
        return
    released = [trainers[number - 1] for number in releases]
    assert all(trainer.leaving for trainer in released)
    assert all(trainer.phase == "waiting" for trainer in (*remaining, *released)), "an update needs a released member"
    savers = [trainer for trainer in released if releases[trainer.number] == Release(save=True)]
    last = any(trainer.has_state for trainer in released) and not any(trainer.has_state for trainer in remaining)
    assert len(savers) == last
    assert all(saver.updates == max(each.updates for each in released if each.has_state) for saver in savers)


def check_places(membership: Membership) -> None:
    places = [(member.node, member.slot) for member in membership.members]
    assert len(set(places)) == len(places), "two members have one place"


def get_message(effect: Tell | Fence) -> Answer:
    """What a trainer is sent, without what does not matter to the model."""
    if isinstance(effect, Fence):
        return FENCED
    return CALL if isinstance(effect.message, Change) else effect.message


def is_release(message: Answer) -> bool:
    return isinstance(message, Release)


def check_order(before: Round | None, numbers: list[int]) -> None:
    """Survivors keep their order, and newcomers come after them."""
    earlier = [member.member for member in before.members] if before else []
    survivors = [number for number in earlier if number in numbers]
    assert numbers[: len(survivors)] == survivors


def check_source(round_: Round, chosen: list[Trainer], members: list[Trainer]) -> None:
    """The state comes from one that is furthest ahead, and goes to everybody that has another one."""
    holders = [trainer for trainer in chosen if trainer.has_state]
    if round_.source is None:
        assert not holders
        assert not round_.receivers
        return
    source = chosen[round_.source]
    living = [each for each in members if each.life == "alive" and each.has_state]
    assert source.has_state
    assert source.updates == max(each.updates for each in (*living, *holders)), (
        "an update that somebody has finished is lost"
    )
    others = {r for r, each in enumerate(chosen) if (each.updates, each.has_state) != (source.updates, True)}
    assert others <= set(round_.receivers)
    assert round_.source not in round_.receivers
