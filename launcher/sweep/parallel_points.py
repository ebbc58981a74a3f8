"""Run points of a sweep in parallel, each in its own process, on its slice of the machine, with its own log."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from launcher.distributed.cleanup_process import CleanupProcess
from launcher.errors import EXIT_FAILED, EXIT_OK
from launcher.sweep.machine_slices import MachineSlice
from launcher.system.atomic_files import PRIVATE_MODE, make_durable_dir
from launcher.system.processes import die_with_parent
from launcher.system.signal_handlers import forward_signals_to

__all__ = ["ParallelRunner", "PointJob"]


@dataclass(frozen=True)
class PointJob:
    """One point: its number, the function that runs it and returns the exit status, and its log file."""

    number: int
    run: Callable[[], int]
    log: Path


class ParallelRunner:
    """Runs jobs in parallel, one per machine slice; a free slice takes the next job.

    Ctrl-C and SIGTERM make all jobs save and stop, and no further job is started; a second Ctrl-C ends them at once.
    """

    def __init__(self, slices: Sequence[MachineSlice], report: Callable[[str], None]) -> None:
        self._free = list(slices)
        self._report = report
        self._running: dict[BaseProcess, tuple[PointJob, MachineSlice]] = {}
        self._signals: list[int] = []
        self._parent_pid = os.getpid()

    @property
    def stop_requested(self) -> bool:
        return bool(self._signals)

    def run(self, jobs: Iterator[PointJob], on_exit: Callable[[PointJob, int], None]) -> None:
        """Run all jobs, taking the next one only when a slice is free; call `on_exit` with each job and status."""
        with forward_signals_to(self._handle_signal):
            try:
                while self._start_jobs(jobs):
                    self._wait_for_jobs(on_exit)
            finally:
                for process in self._running:
                    process.kill()  # its workers die with it

    def _start_jobs(self, jobs: Iterator[PointJob]) -> bool:
        """Start jobs on the free slices; return whether any job is running."""
        while self._free and not self._signals and (job := next(jobs, None)) is not None:
            self._start_job(job, self._free.pop(0))
        return bool(self._running)

    def _start_job(self, job: PointJob, machine_slice: MachineSlice) -> None:
        make_durable_dir(job.log.parent)
        # Fork: the point is already composed and checked, and holds secrets that must not appear on a command line.
        process = get_context("fork").Process(
            target=run_isolated, args=(job, machine_slice, self._parent_pid), name=f"point {job.number}"
        )
        process.start()
        self._running[process] = (job, machine_slice)
        for signum in self._signals:  # signals that arrived before the process was registered
            self._forward_signal(signum, process)

    def _wait_for_jobs(self, on_exit: Callable[[PointJob, int], None]) -> None:
        connection.wait([process.sentinel for process in self._running])
        for process in [process for process in self._running if not process.is_alive()]:
            process.join()
            job, machine_slice = self._running.pop(process)
            self._free.append(machine_slice)
            status = process.exitcode or EXIT_OK
            on_exit(job, status if status >= 0 else EXIT_FAILED)

    def _handle_signal(self, signum: int, _: FrameType | None) -> None:
        if os.getpid() != self._parent_pid:
            raise SystemExit(EXIT_OK)  # a forked point before or after its training: nothing to save
        is_first = not self._signals
        if is_first:
            hint = " (press Ctrl-C again to end at once)" if signum == signal.SIGINT else ""
            self._report(f"{signal.Signals(signum).name}: all points save at the next update, then stop{hint}")
        elif signum != signal.SIGINT:
            return
        self._signals.append(signal.SIGTERM if is_first else signal.SIGINT)
        for process in list(self._running):
            self._forward_signal(self._signals[-1], process)

    def _forward_signal(self, signum: int, process: BaseProcess) -> None:
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, signum)


def run_isolated(job: PointJob, machine_slice: MachineSlice, parent: int) -> None:
    """Run a job in the forked process: detach from the terminal, redirect output to the log, enter the slice."""
    die_with_parent(parent)
    os.setsid()
    CleanupProcess.start()
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, PRIVATE_MODE)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1, encoding="utf-8", errors="replace")
    machine_slice.apply()
    sys.exit(job.run())
