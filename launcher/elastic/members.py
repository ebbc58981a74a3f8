"""A member as the membership state machine sees it, and the round that chosen members form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.elastic.messages import Ready, Round, RoundMember

__all__ = ["Member", "find_furthest", "make_round"]


@dataclass(frozen=True)
class Member:
    """A connected worker: the newest round it was told of, 0 for a newcomer, and its report for the next one."""

    number: int
    node: str
    slot: int
    heard_at: float
    round: int = 0
    report: Ready | None = None
    leaving: bool = False

    @property
    def is_newcomer(self) -> bool:
        return self.round == 0

    @property
    def is_stayer(self) -> bool:
        return self.round > 0 and not self.leaving


def make_round(number: int, chosen: Sequence[Member]) -> Round:
    """Return the round of these members, which are in the order of their ranks and have all reported."""
    giver = find_furthest(chosen)
    receivers = () if giver is None else (rank for rank, each in enumerate(chosen) if must_receive(each, giver))
    return Round(
        number=number,
        members=tuple(place_member(member) for member in chosen),
        source=None if giver is None else chosen.index(giver),
        receivers=tuple(receivers),
        host=get_report(chosen[0]).host,
        port=get_report(chosen[0]).port,
    )


def find_furthest(members: Iterable[Member]) -> Member | None:
    """Return the first of the members that hold the state after the most updates.

    A newcomer's state counts only where no older member holds one: it may be of another history of the training.
    """
    holders = [member for member in members if member.report is not None and member.report.has_state]
    known = [member for member in holders if not member.is_newcomer] or holders
    return max(known, key=lambda member: get_report(member).updates, default=None)


def must_receive(member: Member, giver: Member) -> bool:
    """Whether a member takes the state from the one that gives it: unless it holds exactly this state."""
    report, given = get_report(member), get_report(giver)
    foreign = member.is_newcomer and not giver.is_newcomer
    return foreign or not report.has_state or report.updates != given.updates


def place_member(member: Member) -> RoundMember:
    report = get_report(member)
    return RoundMember(member.number, member.node, member.slot, report.updates, report.has_state)


def get_report(member: Member) -> Ready:
    if member.report is None:
        raise ValueError(f"member {member.number} has not reported")
    return member.report
