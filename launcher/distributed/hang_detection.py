"""Decide which rank of a node has hung, from the phases and heartbeats of its ranks. Pure: no I/O.

Each rank publishes its phase and when that began, and a thread publishes that the process still runs. Neither is enough
alone: the thread's heartbeat continues while a loader or a collective is stuck, and a rank that is in `sync` for long
is waiting for the others and is not the cause.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "OCCASIONAL_PHASES",
    "PHASES",
    "WAITING_PHASE",
    "HangTimeouts",
    "HangVerdict",
    "PhaseTimeouts",
    "RankState",
    "detect_hang",
    "elect_reporter",
]

PHASES = (
    "start", "rendezvous", "restore", "data", "forward", "backward", "sync", "optimizer", "validate", "checkpoint",
    "finish",
)  # fmt: skip

#: The phase in which a rank only waits for the others.
WAITING_PHASE = "sync"
#: Phases whose duration is unrelated to an update's: each is compared with its own earlier occurrences.
OCCASIONAL_PHASES = frozenset(("start", "rendezvous", "restore", "validate", "checkpoint", "finish"))
COMPILED_PHASES = frozenset(("forward", "backward"))

PHASE_TIMEOUT_FACTOR = 10  # a phase that takes this many times its usual duration has hung
ALL_STALLED_FACTOR = 4  # factor on the allowed time if no rank makes progress, so that there is none to compare with
NUM_TIMED_UPDATES = 20


@dataclass(frozen=True)
class HangTimeouts:
    """`elastic.hang_timeout_s` and `elastic.first_timeout_s`: seconds without progress, normally and the first time."""

    hang_s: float
    first_s: float

    @property
    def stopped_timeout_s(self) -> float:
        """Seconds before a stopped process counts as hung: it cannot be busy, but a tool may be reading its stack."""
        return self.hang_s / 3


@dataclass(frozen=True)
class RankState:
    """The state of a rank. Times are of the node's monotonic clock; `since` is when its phase began.

    `stopped` (by a signal or a debugger) and `gone` come from the kernel, the rest from the rank itself.
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
class HangVerdict:
    """The rank of `state` has hung for `seconds`. `kind="all"`: no rank makes progress, this one the longest."""

    state: RankState
    seconds: float
    kind: Literal["stopped", "silent", "stuck", "all"]

    def confirms(self, earlier: HangVerdict | None) -> bool:
        """Whether both name the same rank, phase and reason; a single check may have read a half-written state."""
        if earlier is None or earlier.kind != self.kind:
            return False
        then, now = earlier.state, self.state
        return (then.rank, then.phase, then.update, then.since) == (now.rank, now.phase, now.update, now.since)

    @property
    def location(self) -> str:
        return self.state.phase + (f" of update {self.state.update}" if self.state.update else "")

    @property
    def reason(self) -> str:
        words = {
            "stopped": "its process is stopped, no heartbeat",
            "silent": "no heartbeat",
            "stuck": "no progress while the others wait",
            "all": "no rank of this node makes progress",
        }
        return f"{words[self.kind]} for {self.seconds:.1f} s"


def detect_hang(
    states: Sequence[RankState], now: float, limits: HangTimeouts, watching_since: float = -math.inf
) -> HangVerdict | None:
    """Return the rank that has hung, or None.

    `watching_since`: start of uninterrupted monitoring; time before it (e.g. while the whole job was suspended) is not
    counted.
    """
    return (
        _find_silent_rank(states, now, limits, watching_since)
        or _find_stuck_rank(states, now, watching_since)
        or _detect_all_stalled(states, now, limits, watching_since)
    )


def _find_silent_rank(
    states: Sequence[RankState], now: float, limits: HangTimeouts, watching_since: float
) -> HangVerdict | None:
    """Find a rank without a heartbeat whose process is stopped or is in `sync`, where its threads are free to run.

    In other phases a missing heartbeat proves nothing: a library may hold the GIL for a long computation.
    """
    for state in sorted(states, key=lambda state: state.beat):
        seconds = now - max(state.beat, watching_since)
        if state.stopped and seconds > limits.stopped_timeout_s:
            return HangVerdict(state, seconds, "stopped")
        if state.phase == WAITING_PHASE and seconds > limits.hang_s:
            return HangVerdict(state, seconds, "silent")
    return None


def _find_stuck_rank(states: Sequence[RankState], now: float, watching_since: float) -> HangVerdict | None:
    """Find a rank that exceeds the allowed time of its phase while others wait; of several, the first to enter it."""
    waiting_since = [state.since for state in states if state.phase == WAITING_PHASE]
    if not waiting_since:
        return None
    waits_since = max(watching_since, min(waiting_since))
    working = [state for state in states if state.phase != WAITING_PHASE]
    late = [state for state in working if now - max(state.since, waits_since) > state.allowed_s]
    if not late:
        return None
    state = min(late, key=lambda state: state.since)
    return HangVerdict(state, now - max(state.since, watching_since), "stuck")


def _detect_all_stalled(
    states: Sequence[RankState], now: float, limits: HangTimeouts, watching_since: float
) -> HangVerdict | None:
    """Detect that no rank makes progress: a collective that never ends, or the only rank of a node hangs."""
    if not states:
        return None
    stalled_s = now - max(watching_since, *(state.since for state in states))
    timeout_s = max(max(s.allowed_s, min(ALL_STALLED_FACTOR * s.allowed_s, limits.first_s)) for s in states)
    if stalled_s <= timeout_s:
        return None
    return HangVerdict(min(states, key=lambda state: (state.phase == WAITING_PHASE, state.since)), stalled_s, "all")


def elect_reporter(states: Sequence[RankState], verdict: HangVerdict, now: float, limits: HangTimeouts) -> int | None:
    """Elect the one rank that acts on a verdict: each rank watches the next, and replaces a watcher without heartbeat.

    If no rank makes progress, it is the first one whose heartbeat continues, which may be the hung rank itself.
    """
    beating = [state.rank for state in states if now - state.beat <= limits.stopped_timeout_s]
    if verdict.kind == "all":
        return min(beating, default=None)
    others = [rank for rank in beating if rank != verdict.state.rank]
    return max(others, key=lambda rank: (rank < verdict.state.rank, rank), default=None)


class PhaseTimeouts:
    """How long this rank may stay in a phase, estimated from earlier durations.

    A phase of an update: 10 times the median update and at least `hang_timeout_s`; `first_timeout_s` in the first
    update, which includes setup. Validation and saving: 10 times the longest so far and at least 4 `hang_timeout_s` (a
    short save may have been asynchronous, and the next one may block), the first one `first_timeout_s`. The same holds
    for the wait that follows them, since ranks of another node may still be in that phase. With `compiles`, any forward
    or backward pass may meet a new shape and compile, so it is allowed `first_timeout_s`.
    """

    def __init__(self, limits: HangTimeouts, *, compiles: bool = False) -> None:
        self.limits = limits
        self._compiles = compiles
        self._usual_s = limits.hang_s
        self._updates: deque[float] = deque(maxlen=NUM_TIMED_UPDATES)
        self._update = self._first = 0
        self._update_began = self._since = 0.0
        self._longest: dict[str, float] = {}
        self._kind: str | None = None
        self._after = False

    def record_phase(self, phase: str, update: int, now: float) -> float:
        """Record that `phase` begins and return the seconds it may take."""
        is_special = self._kind or self._after or self._compiles or phase in OCCASIONAL_PHASES
        if update == self._update and update != self._first and not is_special:  # nearly always
            return self._usual_s
        if self._kind is not None:
            self._longest[self._kind] = max(self._longest.get(self._kind, 0.0), now - self._since)
        self._since, self._kind = now, self._get_duration_kind(phase)
        if update != self._update:
            self._record_update(update, now)
        if self._kind is not None:
            longest = self._longest.get(self._kind)
            return (
                self.limits.first_s
                if longest is None
                else max(ALL_STALLED_FACTOR * self.limits.hang_s, PHASE_TIMEOUT_FACTOR * longest)
            )
        if update == self._first or (self._compiles and phase in COMPILED_PHASES):
            return self.limits.first_s
        return self._usual_s

    def _get_duration_kind(self, phase: str) -> str | None:
        """The kind whose earlier durations limit this phase; None for phases limited by the update's duration."""
        if phase in OCCASIONAL_PHASES:
            self._after = True
            return phase
        self._after = self._after and phase != "optimizer"
        return "the wait after" if self._after and phase == WAITING_PHASE else None

    def _record_update(self, update: int, now: float) -> None:
        if self._update:
            self._updates.append(now - self._update_began)
            median_s = sorted(self._updates)[len(self._updates) // 2]
            self._usual_s = max(self.limits.hang_s, PHASE_TIMEOUT_FACTOR * median_s)
        self._first = self._first or update
        self._update, self._update_began = update, now
