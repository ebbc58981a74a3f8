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

from launcher.distributed.hang_detection import (
    OCCASIONAL_PHASES,
    PHASES,
    HangTimeouts,
    HangVerdict,
    PhaseTimeouts,
    RankState,
    detect_hang,
    elect_reporter,
)
from launcher.errors import EXIT_RESTART
from launcher.run_dir import failures
from launcher.run_dir.run_directory import RunDirectory
from launcher.system.processes import read_sibling_state
from launcher.telemetry.records import Event
from launcher.telemetry.sinks.jsonl import append_line_concurrently
from launcher.topology import Topology

__all__ = ["SharedHeartbeats", "Watchdog", "locate_shared_heartbeats"]

HEARTBEAT_INTERVAL_S = 0.25
STALE_HEARTBEAT_S = 1.0  # for a heartbeat older than this, ask the kernel for the state of the process
LATE_CHECK_S = 2.0  # a check later than this means that the watchdog itself was held up
STACK_DUMP_WAIT_S = 0.2  # time for a hung process to write its stacks

PHASE_CODES = {phase: number for number, phase in enumerate(PHASES)}
PHASE_STRUCT = struct.Struct("=qqdd")  # phase, update, start time, allowed seconds
HEARTBEAT_STRUCT = struct.Struct("=qd")  # pid (0: not started yet, or finished), time of the heartbeat
SLOT_BYTES = PHASE_STRUCT.size + HEARTBEAT_STRUCT.size


class SharedHeartbeats:
    """The states of a node's ranks in shared memory, one slot per local rank."""

    def __init__(self, path: Path, count: int) -> None:
        """
        Raises:
            OSError: the file cannot be opened or created, or belongs to another user.
        """
        self._path = path
        self._count = count
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
                raise PermissionError(f"{path} is not a regular file of this user")
            os.ftruncate(fd, SLOT_BYTES * count)
            self._map = mmap.mmap(fd, SLOT_BYTES * count)
        finally:
            os.close(fd)

    def set_phase(self, slot: int, phase: str, update: int, since: float, allowed_s: float) -> None:
        PHASE_STRUCT.pack_into(self._map, slot * SLOT_BYTES, PHASE_CODES[phase], update, since, allowed_s)

    def set_heartbeat(self, slot: int, pid: int, now: float) -> None:
        HEARTBEAT_STRUCT.pack_into(self._map, slot * SLOT_BYTES + PHASE_STRUCT.size, pid, now)

    def read_states(self, first_rank: int) -> Iterator[RankState]:
        """The states of the ranks that have started and not finished."""
        for slot in range(self._count):
            pid, beat = HEARTBEAT_STRUCT.unpack_from(self._map, slot * SLOT_BYTES + PHASE_STRUCT.size)
            if pid:
                code, update, since, allowed_s = PHASE_STRUCT.unpack_from(self._map, slot * SLOT_BYTES)
                yield RankState(first_rank + slot, pid, PHASES[code], update, since, allowed_s, beat)

    def unlink(self) -> None:
        """Unlink the file; existing memory maps stay valid."""
        self._path.unlink(missing_ok=True)


def open_shared_heartbeats(folder: Path, topology: Topology) -> SharedHeartbeats:
    """The shared heartbeats of this node's workers for one run and one generation."""
    return SharedHeartbeats(locate_shared_heartbeats(folder, topology), topology.local_world)


def locate_shared_heartbeats(folder: Path, topology: Topology) -> Path:
    """The file of this node's heartbeats; it exists only until all workers of the node have opened it."""
    key = os.fsencode(f"{folder.resolve()}\0{topology.node}\0{topology.generation}")
    name = f"launcher-beat-{hashlib.blake2b(key, digest_size=12).hexdigest()}"
    return Path(tempfile.gettempdir()) / name


class Watchdog:
    """Publishes this rank's phase to its node, and acts when another rank has hung.

    `exit_process` ends this process without torch's cleanup, which a collective that waits for a dead rank would block.
    """

    def __init__(
        self,
        slots: SharedHeartbeats,
        run_dir: RunDirectory,
        topology: Topology,
        timeouts: PhaseTimeouts,
        terminal: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        exit_process: Callable[[int], None] = os._exit,
    ) -> None:
        self._slots = slots
        self._run_dir = run_dir
        self._topology = topology
        self._timeouts = timeouts
        self._limits = timeouts.limits
        self._terminal = terminal
        self._clock = clock
        self._exit_process = exit_process
        self._update = 0
        self._last_check_s = self._resumed_s = clock()
        self._suspected: HangVerdict | None = None
        self._acted = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @classmethod
    def start(
        cls, run_dir: RunDirectory, topology: Topology, limits: HangTimeouts, *, compiles: bool, terminal: TextIO | None
    ) -> Watchdog | None:
        """Start the watchdog thread; on a node without a usable temp directory, log a warning and return None.

        `terminal` is the stream on which a hang is reported; None if the driver reports it, from the run directory.
        """
        try:
            slots = open_shared_heartbeats(run_dir.path, topology)
            stacks = run_dir.get_log_path(*topology.rank_and_generation).open("a")
        except OSError as problem:
            logging.getLogger(__name__).warning("hung workers on this node will not be detected: %s", problem)
            return None
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True, chain=False)
        watchdog = cls(slots, run_dir, topology, PhaseTimeouts(limits, compiles=compiles), terminal)
        watchdog.enter_phase("start")
        watchdog.publish_heartbeat()
        watchdog.unlink_when_all_joined()
        watchdog._thread.start()
        return watchdog

    def enter_phase(self, phase: str, update: int = 0) -> None:
        """Enter `phase`. Costs about two microseconds."""
        self._update, now = update, self._clock()
        self._slots.set_phase(
            self._topology.local_rank, phase, update, now, self._timeouts.record_phase(phase, update, now)
        )

    def enter_wait(self) -> None:
        """Mark that from here on this rank only waits for the others."""
        self.enter_phase("sync", self._update)

    def node_is_busy(self) -> bool:
        """Whether a rank of this node does what is no part of an update: the others may wait for it that long."""
        return any(state.phase in OCCASIONAL_PHASES for state in self._slots.read_states(0))

    def stop(self, *, finished: bool = False) -> None:
        """Stop the heartbeat before this rank exits. `finished`: it exits normally, so the others need not follow."""
        self._stopped.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        if finished:
            self._slots.set_heartbeat(self._topology.local_rank, 0, self._clock())
        self._slots.unlink()

    def unlink_when_all_joined(self) -> None:
        """Unlink the file if all ranks of the node have opened it."""
        if len(list(self._slots.read_states(0))) == self._topology.local_world:
            self._slots.unlink()

    def publish_heartbeat(self) -> None:
        self._slots.set_heartbeat(self._topology.local_rank, os.getpid(), self._clock())

    def check_peers(self) -> None:
        """Exit if another rank has died, and act on a hang that two checks in a row have confirmed."""
        now, states = self._clock(), self._read_states()
        if now - self._last_check_s > LATE_CHECK_S:
            self._resumed_s = now
        self._last_check_s = now
        dead_rank = next((state for state in states if state.gone), None)
        if dead_rank is not None:
            self._exit_if_blocked(dead_rank, states, now)
        present = [state for state in states if not state.gone]
        verdict = detect_hang(present, now, self._limits, self._resumed_s)
        suspected, self._suspected = self._suspected, verdict
        if self._acted or verdict is None or not verdict.confirms(suspected):
            return
        if elect_reporter(present, verdict, now, self._limits) == self._topology.rank:
            self._kill_hung_ranks(verdict, present)

    def _run(self) -> None:
        while not self._stopped.wait(HEARTBEAT_INTERVAL_S):
            self.publish_heartbeat()
            self.check_peers()

    def _read_states(self) -> list[RankState]:
        now = self._clock()
        first = self._topology.rank - self._topology.local_rank
        states = self._slots.read_states(first)
        return [state if now - state.beat < STALE_HEARTBEAT_S else with_process_state(state) for state in states]

    def _exit_if_blocked(self, dead_rank: RankState, states: list[RankState], now: float) -> None:
        """Exit because a rank has died and this rank is blocked; never while it writes a checkpoint or final files.

        Most calls that communicate fail by themselves when a peer dies; this handles those that do not.
        """
        own = next((state for state in states if state.rank == self._topology.rank), None)
        if own is None or own.phase in ("checkpoint", "finish") or now - own.since < STALE_HEARTBEAT_S:
            return
        message = "rank %d has died and this rank is blocked in %s: exiting"
        logging.getLogger(__name__).warning(message, dead_rank.rank, own.phase)
        self._exit_for_restart()

    def _kill_hung_ranks(self, verdict: HangVerdict, states: list[RankState]) -> None:
        """Dump the stacks, report the hang, and kill the hung ranks: the agent then restarts the workers."""
        self._acted = True  # all workers will be restarted: nothing more to detect
        stopped = [state for state in states if state.stopped]  # a stopped process could not exit with the others
        hung_ranks = states if verdict.kind == "all" else list({verdict.state, *stopped})
        for state in hung_ranks:
            if not state.stopped:
                signal_rank(state, signal.SIGUSR2)
        time.sleep(STACK_DUMP_WAIT_S)
        self._report_hang(verdict)
        for state in hung_ranks:
            if state.rank != self._topology.rank:
                signal_rank(state, signal.SIGKILL)
        if verdict.kind == "all":
            self._exit_for_restart()

    def _report_hang(self, verdict: HangVerdict) -> None:
        """Write a failure for the driver and an alarm event, print a line; a full disk must not prevent the kill."""
        state, generation = verdict.state, self._topology.generation
        log = self._run_dir.get_log_path(state.rank, generation)
        stacks = "" if verdict.kind == "stopped" else f"; stacks in {log}"
        detail = f"rank {state.rank} hung in {verdict.location}: {verdict.reason}; killed so that the workers restart"
        facts = {"rank": state.rank, "phase": state.phase, "update": state.update, "seconds": verdict.seconds}
        alarm = Event(time.time(), "alarm", {"kind": "hang", "detail": detail + stacks, **facts})
        with suppress(OSError):
            failures.write_hang_failure(
                self._run_dir.logs, state.rank, generation, verdict.location, verdict.reason, log
            )
        with suppress(OSError):
            append_line_concurrently(self._run_dir.events, alarm)
        with suppress(OSError):
            if self._terminal is not None:
                print(f"warning: {detail}{stacks}", file=self._terminal, flush=True)

    def _exit_for_restart(self) -> None:
        self._slots.unlink()
        self._exit_process(EXIT_RESTART)


def with_process_state(state: RankState) -> RankState:
    """Add what the kernel reports about the process: stopped or gone."""
    letter = read_sibling_state(state.pid)
    return replace(state, stopped=letter in ("T", "t"), gone=letter in (None, "Z", "X"))


def signal_rank(state: RankState, signum: int) -> None:
    """Send signal `signum` to a rank if its pid still belongs to a process of our own agent."""
    if read_sibling_state(state.pid) is not None:
        with suppress(ProcessLookupError):
            os.kill(state.pid, signum)
