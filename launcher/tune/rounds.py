"""Run measuring in rounds: one process per rank, started together and restarted after running out of memory.

If memory runs out on one rank while the others wait for it in a collective, no rank can continue. All processes end;
the next round receives the results so far and treats the size being measured as one that does not fit.
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

EXIT_LOST = 76  # memory ran out on this rank while the others waited for it
MOST_ROUNDS = 20
RESULT, STATE = "result.json", "state.json"


@dataclass(frozen=True)
class Word:
    """Result of one rank's process. `status` is None if it was killed because another rank failed."""

    status: int | None
    failure: Failure | None = None
    result: Mapping[str, Any] | None = None
    state: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, private: Path, status: int | None) -> Word:
        """Combine the exit status with the files that the process left in its folder."""
        return cls(status, failure.first(private, 0), content(private / RESULT), content(private / STATE))

    def to_facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Word:
        return cls(**{**facts, "failure": facts["failure"] and Failure(**facts["failure"])})


#: Runs one round: takes its number (from 0) and the earlier results, returns every rank's result in rank order.
Start = Callable[[int, Mapping[str, Any] | None], Sequence[Word]]


def in_rounds(start: Start) -> dict[str, Any]:
    """Run rounds until one succeeds, and return the document.

    Raises:
        RequestError: any rank found the request to be wrong.
        Unmeasured: a process was killed, or failed for a reason other than memory.
    """
    earlier: Mapping[str, Any] | None = None
    for number in range(MOST_ROUNDS):
        words = start(number, earlier)
        if all(word.status == EXIT_OK for word in words):
            return dict(words[0].result or {})
        raise_cause(words)
        earlier = after_loss(words[0].state or {})
    times = f"measuring batch sizes ran out of memory {MOST_ROUNDS} times"
    raise Unmeasured(f"{times}: set tune.max, or type a number for batch.per_device")


def raise_cause(words: Sequence[Word]) -> None:
    """Raise the root cause of a failed round; return if memory ran out at a size that the next round can skip.

    A failing rank does not get others killed, but makes many of them fail: so SIGKILL takes precedence, then the first
    error that is not a consequence of another.

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
    return "" if trying is None else f" (while measuring per_device={trying})"


def why(first: Failure) -> Exception:
    """The exception to raise for a worker's recorded failure."""
    if first.status == EXIT_REQUEST:
        return RequestError(first.message)
    at = f" in {first.where}" if first.where else ""
    line = first.message if first.final else f"rank {first.rank} failed{at}: {first.type}: {first.message}"
    return Unmeasured(line, first.traceback)


def after_loss(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state of a search; the size that was being measured, if any, is marked as out of memory."""
    ledger = Ledger.from_facts(facts["ledger"])
    if facts["trying"] is not None:
        ledger = ledger.plus(Visit(facts["trying"], where="a collective"))
    return {"ledger": ledger.to_facts(), "spent_s": facts["spent_s"]}


def content(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else None
