"""The events and effects of the membership state machine."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.elastic.messages import Answer, Request

__all__ = ["AllLost", "Connected", "Disconnected", "Effect", "Ended", "Event", "Fence", "Received", "Tell", "Ticked"]

# --- events: what happened, and when --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Connected:
    """A member has connected with the right token. Members are numbered in the order of their arrival, from 1."""

    at: float
    member: int
    node: str
    slot: int


@dataclass(frozen=True)
class Received:
    """A member has sent a message."""

    at: float
    member: int
    message: Request


@dataclass(frozen=True)
class Disconnected:
    """A connection was closed: its process has died, or is done."""

    at: float
    member: int


@dataclass(frozen=True)
class Ticked:
    """Time has passed. Expected several times per `lost_after_s`; after a longer gap nobody is expelled."""

    at: float


# --- effects: what is to be done ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tell:
    """Send a message to a member."""

    member: int
    message: Answer


@dataclass(frozen=True)
class Fence:
    """Tell a connection that it is not a member any more, and close it."""

    member: int
    reason: str


@dataclass(frozen=True)
class AllLost:
    """No member that holds the training state remains: the next round begins from the checkpoint."""


@dataclass(frozen=True)
class Ended:
    """Training is complete and nobody is left: the service may end."""


Event = Connected | Received | Disconnected | Ticked
Effect = Tell | Fence | AllLost | Ended
