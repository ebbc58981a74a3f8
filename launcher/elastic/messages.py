"""The messages between a member and the membership service, as lines of JSON.

A line holds one object: its `type` and the fields of the message. `decode_request` reads what a member sends and
`decode_answer` what the service sends; both refuse every line that is not exactly such a message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args

__all__ = [
    "Answer",
    "Change",
    "Complete",
    "Fenced",
    "Finish",
    "Heartbeat",
    "HeartbeatAnswer",
    "Hello",
    "Leave",
    "MessageError",
    "Ready",
    "Release",
    "Request",
    "Round",
    "RoundMember",
    "Welcome",
    "decode_answer",
    "decode_request",
    "encode_message",
]

ChangeReason = Literal["join", "leave", "lost", "regroup"]
MAX_TEXT = 255


class MessageError(ValueError):
    """A line is not a message of this protocol."""


# --- from a member to the service -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello:
    """The first message of a connection, with the member's place, from which a newer member takes over.

    `node` names the agent that started the worker, so that two agents of one machine have different ones. `slot` is the
    number of the worker among those of its agent (`launcher.topology.find_slot_number`), the same at each start, and
    not its rank.
    """

    token: str
    node: str
    slot: int


@dataclass(frozen=True)
class Ready:
    """The member waits for the round after `after`, the newest one it knows of; 0 if it has been in none.

    `updates` are the updates it has finished. `has_state` is whether it holds the training state after them: False if
    it has yet to receive or restore it. Its store would listen at `host` and `port` if it became rank 0.
    """

    after: int
    updates: int
    has_state: bool
    host: str
    port: int


@dataclass(frozen=True)
class Heartbeat:
    """The member is alive. The answer carries the same number, so that the member knows when it was last heard."""

    number: int


@dataclass(frozen=True)
class Leave:
    """The member wants to leave politely. It trains on until it is ready for the next round, and is then released."""


@dataclass(frozen=True)
class Finish:
    """Training is complete and its result is written, which the member of round `after` knows of all members."""

    after: int


# --- from the service to a member -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Welcome:
    """The token was right: the number of the member, and after how much silence it counts as lost."""

    member: int
    lost_after_s: float


@dataclass(frozen=True)
class RoundMember:
    """A member's place in a round, with what it reported: its finished updates and whether it holds the state."""

    member: int
    node: str
    slot: int
    updates: int
    has_state: bool


@dataclass(frozen=True)
class Round:
    """A process group to form: its members in the order of their ranks, oldest first.

    `source` is the rank that gives the training state to the ranks of `receivers`. It is None if nobody holds it: all
    members begin from the checkpoint, or anew. The store of the round listens at `host` and `port`, in rank 0.
    """

    number: int
    members: tuple[RoundMember, ...]
    source: int | None
    receivers: tuple[int, ...]
    host: str
    port: int

    @property
    def world_size(self) -> int:
        return len(self.members)

    @property
    def updates(self) -> int:
        """The finished updates that the round continues from; 0 if nobody holds the state."""
        return 0 if self.source is None else self.members[self.source].updates

    def find_rank(self, member: int) -> int:
        """Return the rank of a member.

        Raises:
            ValueError: it is not in this round.
        """
        return [each.member for each in self.members].index(member)


@dataclass(frozen=True)
class Change:
    """The member is to come to a new round: at the end of its update, or at once after `lost` and `regroup`.

    `regroup`: another member already waits for the round, e.g. since one of its collectives failed.
    """

    reason: ChangeReason


@dataclass(frozen=True)
class Release:
    """The member may go. With `save` it is the last one that holds the training state, which only it can save."""

    save: bool


@dataclass(frozen=True)
class Complete:
    """Training is complete: the answer to `Finish`, and to whoever waits for a round that will not come."""


@dataclass(frozen=True)
class HeartbeatAnswer:
    """The service has received the heartbeat with this number."""

    number: int


@dataclass(frozen=True)
class Fenced:
    """The connection is not a member any more and must not act; its process can only come back as a new member."""

    reason: str


Request = Hello | Ready | Heartbeat | Leave | Finish
Answer = Welcome | Round | Change | Release | Complete | HeartbeatAnswer | Fenced

REQUESTS: Mapping[str, type[Request]] = {
    "hello": Hello, "ready": Ready, "heartbeat": Heartbeat, "leave": Leave, "finish": Finish,
}  # fmt: skip
ANSWERS: Mapping[str, type[Answer]] = {
    "welcome": Welcome, "round": Round, "change": Change, "release": Release, "complete": Complete,
    "heartbeat": HeartbeatAnswer, "fenced": Fenced,
}  # fmt: skip
TYPE_NAMES = {kind: name for kinds in (REQUESTS, ANSWERS) for name, kind in kinds.items()}

Message = TypeVar("Message")


def encode_message(message: Request | Answer) -> bytes:
    """Return the message as a line of JSON."""
    return json.dumps({"type": TYPE_NAMES[type(message)], **asdict(message)}).encode() + b"\n"


def decode_request(line: bytes) -> Request:
    """Read a member's message.

    Raises:
        MessageError: the line is not such a message.
    """
    kind, values = read_object(line, REQUESTS)
    return build_message(kind, values)


def decode_answer(line: bytes) -> Answer:
    """Read a message of the service.

    Raises:
        MessageError: the line is not such a message.
    """
    kind, values = read_object(line, ANSWERS)
    return decode_round(values) if kind is Round else build_message(kind, values)


def read_object(line: bytes, kinds: Mapping[str, type[Message]]) -> tuple[type[Message], dict[str, Any]]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MessageError("the line is not JSON") from error
    if not isinstance(values, dict) or not isinstance(values.get("type"), str) or values["type"] not in kinds:
        raise MessageError(f"the line has no type out of {', '.join(kinds)}")
    return kinds[values.pop("type")], values


def decode_round(values: dict[str, Any]) -> Round:
    members, receivers = values.pop("members", None), values.pop("receivers", None)
    if not isinstance(members, list) or not isinstance(receivers, list):
        raise MessageError("a round has a list of members and a list of receivers")
    if not all(isinstance(each, dict) for each in members) or not all(is_count(rank) for rank in receivers):
        raise MessageError("a round has objects as members and ranks as receivers")
    placed = tuple(build_message(RoundMember, each) for each in members)
    checks = {field.name: field.type for field in fields(Round) if field.name not in ("members", "receivers")}
    check_fields("Round", values, checks)
    return Round(members=placed, receivers=tuple(receivers), **values)


def build_message(kind: type[Message], values: dict[str, Any]) -> Message:
    check_fields(kind.__name__, values, {field.name: field.type for field in fields(kind)})  # type: ignore[arg-type]
    return kind(**values)


def check_fields(name: str, values: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a message that has not exactly the fields of its class, each of its type."""
    if set(values) != set(expected):
        raise MessageError(f"{name} has the fields {', '.join(expected) or 'none'}")
    wrong = [field for field, kind in expected.items() if not CHECKS[kind](values[field])]
    if wrong:
        raise MessageError(f"{name} has a wrong value of {', '.join(wrong)}")


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


CHECKS: Mapping[str, Any] = {
    "int": is_count,
    "int | None": lambda value: value is None or is_count(value),
    "float": lambda value: type(value) in (int, float) and value >= 0,
    "bool": lambda value: type(value) is bool,
    "str": lambda value: type(value) is str and len(value) <= MAX_TEXT,
    "ChangeReason": lambda value: value in get_args(ChangeReason),
}
