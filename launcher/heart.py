"""A rank's heartbeat: where it stands, for the other ranks of its node to see, and a thread that looks at theirs.

The states lie in a small file that the ranks of a node map into memory: they are there to be read when their process
has stopped. The file has a name only until all have opened it, so nothing of it can be left behind.
"""

from __future__ import annotations

import faulthandler
import hashlib
import logging
import mmap
import os
import signal
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from launcher import failure
from launcher.errors import EXIT_AGAIN
from launcher.heartbeat import PHASES, Limits, Pace, State, Verdict, finder, judge
from launcher.process import siblings_state
from launcher.reading import Event
from launcher.runfolder import RunFolder
from launcher.sinks.jsonl import add_beside
from launcher.topology import Topology

__all__ = ["Heart", "Slots", "Still"]

EVERY_S = 0.25
SUSPECT_S = 1.0  # a beat this old: ask the kernel what has become of the process
LATE_S = 2.0  # a look this late: the judge itself was held up
DUMP_S = 0.2  # for a hung process to write down its stacks

CODE = {phase: number for number, phase in enumerate(PHASES)}
MARK = struct.Struct("=qqdd")  # phase, update, since when, how long it may take
BEAT = struct.Struct("=qd")  # pid (0: not there yet, or finished), when
SLOT_BYTES = MARK.size + BEAT.size


class Slots:
    """The node's states, one slot per local rank."""

    def __init__(self, path: Path, count: int) -> None:
        """
        Raises:
            OSError: the file cannot be had, or is not this user's own.
        """
        self._path = path
        self._count = count
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            found = os.fstat(number)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
                raise PermissionError(f"{path} is not a file of this user")
            os.ftruncate(number, SLOT_BYTES * count)
            self._map = mmap.mmap(number, SLOT_BYTES * count)
        finally:
            os.close(number)

    def mark(self, slot: int, phase: str, update: int, since: float, allowed_s: float) -> None:
        MARK.pack_into(self._map, slot * SLOT_BYTES, CODE[phase], update, since, allowed_s)

    def beat(self, slot: int, pid: int, now: float) -> None:
        BEAT.pack_into(self._map, slot * SLOT_BYTES + MARK.size, pid, now)

    def states(self, first_rank: int) -> Iterator[State]:
        """Of those that are there."""
        for slot in range(self._count):
            pid, beat = BEAT.unpack_from(self._map, slot * SLOT_BYTES + MARK.size)
            if pid:
                code, update, since, allowed_s = MARK.unpack_from(self._map, slot * SLOT_BYTES)
                yield State(first_rank + slot, pid, PHASES[code], update, since, allowed_s, beat)

    def hide(self) -> None:
        """Take the file's name away; who has it mapped keeps it."""
        self._path.unlink(missing_ok=True)


def slots_of(folder: Path, topology: Topology) -> Slots:
    """Those of one start of one run's workers on this node."""
    key = f"{folder.resolve()}\0{topology.node}\0{topology.generation}".encode()
    name = f"launcher-beat-{hashlib.blake2b(key, digest_size=12).hexdigest()}"
    return Slots(Path(tempfile.gettempdir()) / name, topology.local_world)


class Heart:
    """Tells the node where this rank stands, and acts where another one has hung.

    `leave` ends this process without a word to torch: a collective that waits for a dead rank would not let it go.
    """

    def __init__(
        self,
        slots: Slots,
        folder: RunFolder,
        topology: Topology,
        pace: Pace,
        limits: Limits,
        screen: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self._slots = slots
        self._folder = folder
        self._topology = topology
        self._pace = pace
        self._limits = limits
        self._screen = screen
        self._clock = clock
        self._leave = leave
        self._update = 0
        self._looked = self._awake = clock()
        self._suspected: Verdict | None = None
        self._acted = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @classmethod
    def start(
        cls, folder: RunFolder, topology: Topology, limits: Limits, *, compiles: bool, screen: TextIO | None
    ) -> Heart | Still:
        """A beating heart; on a node without a usable temporary folder none, which is said in the log.

        `screen`: where to say who hung; None where the driver does, from what is found in the run folder.
        """
        try:
            slots = slots_of(folder.path, topology)
            stacks = folder.log(*topology.place).open("a")
        except OSError as problem:
            logging.getLogger(__name__).warning("hung workers will not be found: %s", problem)
            return Still()
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True, chain=False)
        heart = cls(slots, folder, topology, Pace(limits, compiles=compiles), limits, screen)
        heart.phase("start")
        heart.beat()
        heart.hide_when_complete()
        heart._thread.start()
        return heart

    def phase(self, phase: str, update: int = 0) -> None:
        """A phase begins. Costs about two microseconds."""
        self._update, now = update, self._clock()
        self._slots.mark(self._topology.local_rank, phase, update, now, self._pace.entered(phase, update, now))

    def waits(self) -> None:
        """From here on this rank only waits for the others."""
        self.phase("sync", self._update)

    def stop(self, *, finished: bool = False) -> None:
        """No more beats: this rank is about to leave. `finished`: as it should, so the others need not follow."""
        self._over.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        if finished:
            self._slots.beat(self._topology.local_rank, 0, self._clock())
        self._slots.hide()

    def hide_when_complete(self) -> None:
        """The last rank to come takes the file's name away."""
        if len(list(self._slots.states(0))) == self._topology.local_world:
            self._slots.hide()

    def beat(self) -> None:
        self._slots.beat(self._topology.local_rank, os.getpid(), self._clock())

    def look(self) -> None:
        """Follow a rank that has died, and act on a verdict that was reached twice in a row."""
        now, states = self._clock(), self._states()
        if now - self._looked > LATE_S:
            self._awake = now
        self._looked = now
        gone = next((state for state in states if state.gone), None)
        if gone is not None:
            self._follow(gone, states, now)
        present = [state for state in states if not state.gone]
        verdict = judge(present, now, self._limits, self._awake)
        suspected, self._suspected = self._suspected, verdict
        if self._acted or verdict is None or not verdict.confirms(suspected):
            return
        if finder(present, verdict, now, self._limits) == self._topology.rank:
            self._act(verdict, present)

    def _run(self) -> None:
        while not self._over.wait(EVERY_S):
            self.beat()
            self.look()

    def _states(self) -> list[State]:
        now = self._clock()
        first = self._topology.rank - self._topology.local_rank
        states = self._slots.states(first)
        return [state if now - state.beat < SUSPECT_S else known(state) for state in states]

    def _follow(self, gone: State, states: list[State], now: float) -> None:
        """A rank has died. Most calls fail by themselves then; one that doesn't is left, but no half-written file."""
        own = next((state for state in states if state.rank == self._topology.rank), None)
        if own is None or own.phase in ("checkpoint", "finish") or now - own.since < SUSPECT_S:
            return
        logging.getLogger(__name__).warning("rank %d is gone, and %s has not noticed: leaving", gone.rank, own.phase)
        self._end()

    def _act(self, verdict: Verdict, states: list[State]) -> None:
        """Have the stacks written down, say what was found, and end who hangs: the agent starts the workers again."""
        self._acted = True  # all will be started again: there is nothing more to find
        stopped = [state for state in states if state.stopped]  # they could not even leave with the others
        ended = states if verdict.why == "all" else list({verdict.state, *stopped})
        for state in ended:
            if not state.stopped:
                tell(state, signal.SIGUSR2)
        time.sleep(DUMP_S)
        self._say(verdict)
        for state in ended:
            if state.rank != self._topology.rank:
                tell(state, signal.SIGKILL)
        if verdict.why == "all":
            self._end()

    def _say(self, verdict: Verdict) -> None:
        """A failure for the driver, an alarm among the events, a line on the screen; a full disk hinders nothing."""
        state, generation = verdict.state, self._topology.generation
        log = self._folder.log(state.rank, generation)
        stacks = "" if verdict.why == "stopped" else f"; stacks in {log}"
        detail = f"rank {state.rank} hung in {verdict.place}: {verdict.reason}; killed, so that the workers start again"
        facts = {"rank": state.rank, "phase": state.phase, "update": state.update, "seconds": verdict.seconds}
        alarm = Event(time.time(), "alarm", {"kind": "hang", "detail": detail + stacks, **facts})
        with suppress(OSError):
            failure.hung(self._folder.logs, state.rank, generation, verdict.place, verdict.reason, log)
        with suppress(OSError):
            add_beside(self._folder.events, alarm)
        with suppress(OSError):
            if self._screen is not None:
                print(f"warning: {detail}{stacks}", file=self._screen, flush=True)

    def _end(self) -> None:
        self._slots.hide()
        self._leave(EXIT_AGAIN)


class Still:
    """No heart: nobody watches."""

    def phase(self, phase: str, update: int = 0) -> None: ...

    def waits(self) -> None: ...

    def stop(self, *, finished: bool = False) -> None: ...


def known(state: State) -> State:
    """With what the kernel knows of its process."""
    letter = siblings_state(state.pid)
    return replace(state, stopped=letter in ("T", "t"), gone=letter in (None, "Z", "X"))


def tell(state: State, number: int) -> None:
    """A signal to a rank, if its pid is still that of a process of our own agent."""
    if siblings_state(state.pid) is not None:
        with suppress(ProcessLookupError):
            os.kill(state.pid, number)
