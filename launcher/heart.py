"""Hang detection: each rank publishes its phase and heartbeat to its node, and a thread checks the other ranks.

The states are kept in a small file that the ranks of a node map into memory, so they can be read even when the process
that wrote them has stopped. The file is unlinked as soon as all ranks have opened it, so that it is never left behind.
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
SUSPECT_S = 1.0  # for a heartbeat older than this, ask the kernel for the state of the process
LATE_S = 2.0  # a check later than this means that the watchdog itself was held up
DUMP_S = 0.2  # time for a hung process to write its stacks

CODE = {phase: number for number, phase in enumerate(PHASES)}
MARK = struct.Struct("=qqdd")  # phase, update, start time, allowed seconds
BEAT = struct.Struct("=qd")  # pid (0: not started yet, or finished), time of the heartbeat
SLOT_BYTES = MARK.size + BEAT.size


class Slots:
    """The states of a node's ranks in shared memory, one slot per local rank."""

    def __init__(self, path: Path, count: int) -> None:
        """
        Raises:
            OSError: the file cannot be opened or created, or belongs to another user.
        """
        self._path = path
        self._count = count
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            found = os.fstat(number)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
                raise PermissionError(f"{path} is not a regular file of this user")
            os.ftruncate(number, SLOT_BYTES * count)
            self._map = mmap.mmap(number, SLOT_BYTES * count)
        finally:
            os.close(number)

    def mark(self, slot: int, phase: str, update: int, since: float, allowed_s: float) -> None:
        MARK.pack_into(self._map, slot * SLOT_BYTES, CODE[phase], update, since, allowed_s)

    def beat(self, slot: int, pid: int, now: float) -> None:
        BEAT.pack_into(self._map, slot * SLOT_BYTES + MARK.size, pid, now)

    def states(self, first_rank: int) -> Iterator[State]:
        """The states of the ranks that have started and not finished."""
        for slot in range(self._count):
            pid, beat = BEAT.unpack_from(self._map, slot * SLOT_BYTES + MARK.size)
            if pid:
                code, update, since, allowed_s = MARK.unpack_from(self._map, slot * SLOT_BYTES)
                yield State(first_rank + slot, pid, PHASES[code], update, since, allowed_s, beat)

    def hide(self) -> None:
        """Unlink the file; existing memory maps stay valid."""
        self._path.unlink(missing_ok=True)


def slots_of(folder: Path, topology: Topology) -> Slots:
    """The shared heartbeats of this node's workers for one run and one generation."""
    key = f"{folder.resolve()}\0{topology.node}\0{topology.generation}".encode()
    name = f"launcher-beat-{hashlib.blake2b(key, digest_size=12).hexdigest()}"
    return Slots(Path(tempfile.gettempdir()) / name, topology.local_world)


class Heart:
    """Publishes this rank's phase to its node, and acts when another rank has hung.

    `leave` ends this process without torch's cleanup, which a collective that waits for a dead rank would block.
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
        """Start the watchdog thread; on a node without a usable temp directory, log a warning and return a no-op.

        `screen` is the stream on which a hang is reported; None if the driver reports it, from the run directory.
        """
        try:
            slots = slots_of(folder.path, topology)
            stacks = folder.log(*topology.place).open("a")
        except OSError as problem:
            logging.getLogger(__name__).warning("hung workers on this node will not be detected: %s", problem)
            return Still()
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True, chain=False)
        heart = cls(slots, folder, topology, Pace(limits, compiles=compiles), limits, screen)
        heart.phase("start")
        heart.beat()
        heart.hide_when_complete()
        heart._thread.start()
        return heart

    def phase(self, phase: str, update: int = 0) -> None:
        """Enter `phase`. Costs about two microseconds."""
        self._update, now = update, self._clock()
        self._slots.mark(self._topology.local_rank, phase, update, now, self._pace.entered(phase, update, now))

    def waits(self) -> None:
        """Mark that from here on this rank only waits for the others."""
        self.phase("sync", self._update)

    def stop(self, *, finished: bool = False) -> None:
        """Stop the heartbeat before this rank exits. `finished`: it exits normally, so the others need not follow."""
        self._over.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        if finished:
            self._slots.beat(self._topology.local_rank, 0, self._clock())
        self._slots.hide()

    def hide_when_complete(self) -> None:
        """Unlink the file if all ranks of the node have opened it."""
        if len(list(self._slots.states(0))) == self._topology.local_world:
            self._slots.hide()

    def beat(self) -> None:
        self._slots.beat(self._topology.local_rank, os.getpid(), self._clock())

    def look(self) -> None:
        """Exit if another rank has died, and act on a hang that two checks in a row have confirmed."""
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
        """Exit because a rank has died and this rank is blocked; never while it writes a checkpoint or final files.

        Most calls that communicate fail by themselves when a peer dies; this handles those that do not.
        """
        own = next((state for state in states if state.rank == self._topology.rank), None)
        if own is None or own.phase in ("checkpoint", "finish") or now - own.since < SUSPECT_S:
            return
        message = "rank %d has died and this rank is blocked in %s: exiting"
        logging.getLogger(__name__).warning(message, gone.rank, own.phase)
        self._end()

    def _act(self, verdict: Verdict, states: list[State]) -> None:
        """Dump the stacks, report the hang, and kill the hung ranks: the agent then restarts the workers."""
        self._acted = True  # all workers will be restarted: nothing more to detect
        stopped = [state for state in states if state.stopped]  # a stopped process could not exit with the others
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
        """Write a failure for the driver and an alarm event, print a line; a full disk must not prevent the kill."""
        state, generation = verdict.state, self._topology.generation
        log = self._folder.log(state.rank, generation)
        stacks = "" if verdict.why == "stopped" else f"; stacks in {log}"
        detail = f"rank {state.rank} hung in {verdict.place}: {verdict.reason}; killed so that the workers restart"
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
    """No-op watchdog for nodes without a usable temp directory."""

    def phase(self, phase: str, update: int = 0) -> None: ...

    def waits(self) -> None: ...

    def stop(self, *, finished: bool = False) -> None: ...


def known(state: State) -> State:
    """Add what the kernel reports about the process: stopped or gone."""
    letter = siblings_state(state.pid)
    return replace(state, stopped=letter in ("T", "t"), gone=letter in (None, "Z", "X"))


def tell(state: State, number: int) -> None:
    """Send signal `number` to a rank if its pid still belongs to a process of our own agent."""
    if siblings_state(state.pid) is not None:
        with suppress(ProcessLookupError):
            os.kill(state.pid, number)
