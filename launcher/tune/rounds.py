"""Measuring goes in rounds: one process for each rank, started together, and started again after memory ran out.

Where memory runs out on one rank while the others wait for it in a collective, nobody can go on. All of them end, and
the next ones know what was found until then, and that the size under way does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

from launcher import failure
from launcher.errors import EXIT_AGAIN, EXIT_OK, EXIT_REQUEST, RequestError
from launcher.failure import Failure
from launcher.tune.auto import Unmeasured
from launcher.tune.ledger import Ledger, Visit

__all__ = ["EXIT_LOST", "RESULT", "STATE", "Start", "Word", "after_loss", "in_rounds", "why"]

EXIT_LOST = 76  # memory ran out on this rank alone, while the others waited for it
MOST_ROUNDS = 20
RESULT, STATE = "result.json", "state.json"


@dataclass(frozen=True)
class Word:
    """What came of one rank's process. `status` is None where it was ended because of another's."""

    status: int | None
    failure: Failure | None = None
    result: Mapping[str, Any] | None = None
    state: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, private: Path, status: int | None) -> Word:
        """With what the process left in its folder."""
        return cls(status, failure.first(private, 0), content(private / RESULT), content(private / STATE))

    def to_facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Word:
        return cls(**{**facts, "failure": facts["failure"] and Failure(**facts["failure"])})


#: One round: its number, from 0, and what those before found out; every rank's word, in order of rank.
Start = Callable[[int, Mapping[str, Any] | None], Sequence[Word]]


def in_rounds(start: Start) -> dict[str, Any]:
    """The document that the ranks come to.

    Raises:
        RequestError: the request is wrong, found by any rank.
        Unmeasured: a process failed for another reason than memory, or was killed.
    """
    earlier: Mapping[str, Any] | None = None
    for number in range(MOST_ROUNDS):
        words = start(number, earlier)
        if all(word.status == EXIT_OK for word in words):
            return dict(words[0].result or {})
        raise_cause(words)
        earlier = after_loss(words[0].state or {})
    raise Unmeasured(f"measuring batch sizes ran out of memory {MOST_ROUNDS} times: type tune.max= or a number")


def raise_cause(words: Sequence[Word]) -> None:
    """Returns where memory ran out under a size that can be left out.

    Nobody is killed by another's failure, but many fail because of it: what the kernel did comes first, then the first
    error that is none of its consequences.

    Raises:
        RequestError, Unmeasured: as `in_rounds`.
    """
    left = {rank: word.status for rank, word in enumerate(words) if word.status not in (None, EXIT_OK)}
    errors = sorted((word.failure for word in words if word.failure is not None), key=lambda one: one.time)
    real = next((one for one in errors if not failure.consequence(one.message)), None)
    killed = {rank: status for rank, status in left.items() if status == -SIGKILL}
    if killed:
        raise Unmeasured(failure.departed(killed) + while_at(words[0].state))
    if real is not None:
        raise why(real)
    if EXIT_LOST in left.values() and words[0].state is not None:
        return
    alone = {rank: status for rank, status in left.items() if status not in (EXIT_AGAIN, EXIT_LOST)}
    if not alone and errors:
        raise why(errors[0])
    raise Unmeasured(failure.departed(alone or left))


def while_at(state: Mapping[str, Any] | None) -> str:
    trying = (state or {}).get("trying")
    return "" if trying is None else f" (per_device={trying} was under way)"


def why(first: Failure) -> Exception:
    """What to raise for a worker's last word."""
    if first.status == EXIT_REQUEST:
        return RequestError(first.message)
    at = f" in {first.where}" if first.where else ""
    line = first.message if first.final else f"rank {first.rank} failed{at}: {first.type}: {first.message}"
    return Unmeasured(line, first.traceback)


def after_loss(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a survey wrote down, with the size under way, if one was, as one that memory ran out at."""
    ledger = Ledger.from_facts(facts["ledger"])
    if facts["trying"] is not None:
        ledger = ledger.plus(Visit(facts["trying"], where="a collective"))
    return {"ledger": ledger.to_facts(), "spent_s": facts["spent_s"]}


def content(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else None
