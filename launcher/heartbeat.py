"""Which of a node's ranks has hung, judged from what each says of itself: states and times in, a verdict out.

A rank says in which phase it stands and since when; a thread of it says that the process still runs. Neither is enough
alone: a thread goes on beating while a loader or a collective is stuck, and one that stands in `sync` for long waits
for the others, which is no fault of its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["PHASES", "WAITING", "Limits", "Pace", "State", "Verdict", "finder", "judge"]

PHASES = (
    "start", "rendezvous", "restore", "data", "forward", "backward", "sync", "optimizer", "validate", "checkpoint",
    "finish",
)  # fmt: skip

#: In this phase a rank only waits for the others.
WAITING = "sync"
#: Their length has nothing to do with an update's: each is held to its own earlier ones.
OCCASIONAL = frozenset(("start", "rendezvous", "restore", "validate", "checkpoint", "finish"))
COMPILED = frozenset(("forward", "backward"))

TIMES = 10  # a phase that takes this many times its usual length has hung
ALL_TIMES = 4  # patience, in allowances, where all stand still and there is nobody to compare with
UPDATES = 20


@dataclass(frozen=True)
class Limits:
    """`elastic.hang_s` and `elastic.first_s`: seconds without progress, usually and in a first occurrence."""

    hang_s: float
    first_s: float

    @property
    def silent_s(self) -> float:
        """How long a stopped process is given: it can't be busy, but a tool may look at its stack."""
        return self.hang_s / 3


@dataclass(frozen=True)
class State:
    """What is known of a rank. Times are the node's monotonic clock; `since` is when its phase began.

    `stopped` (by a signal, or a debugger) and `gone` come from the kernel, the rest from the rank itself.
    """

    rank: int
    pid: int
    phase: str
    update: int
    since: float
    allowed_s: float
    beat: float
    stopped: bool = False
    gone: bool = False


@dataclass(frozen=True)
class Verdict:
    """`state` has hung for `seconds`. `all`: everybody stands still, and it is the one that has done so longest."""

    state: State
    seconds: float
    why: Literal["stopped", "silent", "stuck", "all"]

    def confirms(self, earlier: Verdict | None) -> bool:
        """Whether it says the same of the same phase; a single look may have caught a state half written."""
        if earlier is None or earlier.why != self.why:
            return False
        then, now = earlier.state, self.state
        return (then.rank, then.phase, then.update, then.since) == (now.rank, now.phase, now.update, now.since)

    @property
    def place(self) -> str:
        return self.state.phase + (f" of update {self.state.update}" if self.state.update else "")

    @property
    def reason(self) -> str:
        words = {
            "stopped": "its process is stopped, no sign of life",
            "silent": "no sign of life",
            "stuck": "no progress while the others wait",
            "all": "no rank of this node makes progress",
        }
        return f"{words[self.why]} for {self.seconds:.1f} s"


def judge(states: Sequence[State], now: float, limits: Limits, awake: float = -math.inf) -> Verdict | None:
    """The rank that has hung, or None.

    `awake`: since when the judge has been looking without a break. What it slept through (a job that was suspended as
    a whole) it cannot hold against the others.
    """
    return _silent(states, now, limits, awake) or _stuck(states, now, awake) or _all(states, now, limits, awake)


def _silent(states: Sequence[State], now: float, limits: Limits, awake: float) -> Verdict | None:
    """No beat: a stopped process, or one that waits and so leaves its threads free to run, but doesn't.

    Elsewhere silence proves nothing: a library may compute for long without letting other threads in.
    """
    for state in sorted(states, key=lambda state: state.beat):
        seconds = now - max(state.beat, awake)
        if state.stopped and seconds > limits.silent_s:
            return Verdict(state, seconds, "stopped")
        if state.phase == WAITING and seconds > limits.hang_s:
            return Verdict(state, seconds, "silent")
    return None


def _stuck(states: Sequence[State], now: float, awake: float) -> Verdict | None:
    """Somebody works on one phase for longer than it may, others waiting all the while; of several the first."""
    waiting = [state.since for state in states if state.phase == WAITING]
    if not waiting:
        return None
    waited = max(awake, min(waiting))
    working = [state for state in states if state.phase != WAITING]
    late = [state for state in working if now - max(state.since, waited) > state.allowed_s]
    if not late:
        return None
    state = min(late, key=lambda state: state.since)
    return Verdict(state, now - max(state.since, awake), "stuck")


def _all(states: Sequence[State], now: float, limits: Limits, awake: float) -> Verdict | None:
    """A collective that never ends, or a rank that hangs alone."""
    if not states:
        return None
    still_s = now - max(awake, *(state.since for state in states))
    patience_s = max(max(s.allowed_s, min(ALL_TIMES * s.allowed_s, limits.first_s)) for s in states)
    if still_s <= patience_s:
        return None
    return Verdict(min(states, key=lambda state: (state.phase == WAITING, state.since)), still_s, "all")


def finder(states: Sequence[State], verdict: Verdict, now: float, limits: Limits) -> int | None:
    """The one rank that acts on a verdict: each watches the next one, and stands in for a watcher that is silent.

    Where all stand still it is the first whose thread still beats, which may be the named rank itself.
    """
    beating = [state.rank for state in states if now - state.beat <= limits.silent_s]
    if verdict.why == "all":
        return min(beating, default=None)
    others = [rank for rank in beating if rank != verdict.state.rank]
    return max(others, key=lambda rank: (rank < verdict.state.rank, rank), default=None)


class Pace:
    """How long this rank may stay in a phase, learned from how long it has stayed in them.

    A phase of an update: 10 times the median update, at least `hang_s`; `first_s` in the first update, which sets
    up what the later ones use. Validation and saving: 10 times the longest so far and at least 4 `hang_s` (a short
    save is one that nobody waited for; the next may have to), the first `first_s`; so is the wait after them, in which
    ranks of another node may still be at it. With `compiles` any forward or backward pass may
    meet a shape that has to be compiled.
    """

    def __init__(self, limits: Limits, *, compiles: bool = False) -> None:
        self._limits = limits
        self._compiles = compiles
        self._usual_s = limits.hang_s
        self._updates: deque[float] = deque(maxlen=UPDATES)
        self._update = self._first = 0
        self._turned = self._since = 0.0
        self._longest: dict[str, float] = {}
        self._kind: str | None = None
        self._after = False

    def entered(self, phase: str, update: int, now: float) -> float:
        """A phase begins: the seconds it may take."""
        if self._kind is not None:
            self._longest[self._kind] = max(self._longest.get(self._kind, 0.0), now - self._since)
        self._since, self._kind = now, self._kind_of(phase)
        if update != self._update:
            self._turn(update, now)
        if self._kind is not None:
            longest = self._longest.get(self._kind)
            return self._limits.first_s if longest is None else max(ALL_TIMES * self._limits.hang_s, TIMES * longest)
        if update == self._first or (self._compiles and phase in COMPILED):
            return self._limits.first_s
        return self._usual_s

    def _kind_of(self, phase: str) -> str | None:
        """Whose earlier lengths this phase is held to; None for the update's."""
        if phase in OCCASIONAL:
            self._after = True
            return phase
        self._after = self._after and phase != "optimizer"
        return "the wait after" if self._after and phase == WAITING else None

    def _turn(self, update: int, now: float) -> None:
        if self._update:
            self._updates.append(now - self._turned)
            median_s = sorted(self._updates)[len(self._updates) // 2]
            self._usual_s = max(self._limits.hang_s, TIMES * median_s)
        self._first = self._first or update
        self._update, self._turned = update, now
