"""Processes of one machine: who dies with whom, and when one was started. Linux."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

__all__ = [
    "as_if_started",
    "catches",
    "children",
    "cpu_s",
    "die_with_parent",
    "end",
    "holds",
    "runs",
    "siblings_state",
    "started_at",
]

PR_SET_PDEATHSIG = 1
LOOK_EVERY_S = 0.05
GONE_WITHIN_S = 3.0


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, however that ends.

    The parent may have ended already, between its fork and this call: then there is nobody to wait for. `parent` is its
    pid where it is known, as to a process that was forked.
    """
    before = parent or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != before:
        os.kill(os.getpid(), signal.SIGKILL)


def as_if_started(parent: int) -> None:
    """Make a process that was forked from `parent` one that was started by it: its own signals, and none of its end.

    Python's handlers are the parent's; what is ignored stays so, as it does for a program that is started.
    """
    die_with_parent(parent)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those it started; returns when all are gone. Nothing where it has ended by itself.

    For one whose children die with it: when it has gone, the kernel has ended them too.
    """
    if process.poll() is not None:
        return
    pids = children(process.pid)
    process.kill()
    process.wait()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end_s = time.monotonic() + GONE_WITHIN_S
    while any(map(runs, pids)) and time.monotonic() < end_s:
        time.sleep(LOOK_EVERY_S)


def holds(device: Callable[[str], bool]) -> bool:
    """Whether this process has a file open whose path `device` says yes to."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing itself is gone
            if device(os.readlink(f"/proc/self/fd/{number}")):
                return True
    return False


def children(pid: int) -> list[int]:
    """The pids of a process's children; none where it is gone."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return found


def started_at(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot: with its pid it names a process for good."""
    known = stat(pid)
    return None if known is None else int(known[19])


def cpu_s(pid: int) -> float | None:
    """The CPU time that a process has taken so far, to 10 ms; None where it is gone."""
    known = stat(pid)
    return None if known is None else (int(known[11]) + int(known[12])) / os.sysconf("SC_CLK_TCK")


def runs(pid: int) -> bool:
    """Whether a process is there and has not ended: one that nobody waited for stays as a zombie."""
    known = stat(pid)
    return known is not None and known[0] not in ("Z", "X")


def siblings_state(pid: int) -> str | None:
    """The kernel's letter for the state of a child of our parent (T: stopped, Z: dead); None where it is gone."""
    known = stat(pid)
    return None if known is None or int(known[1]) != os.getppid() else known[0]


def stat(pid: int) -> list[str] | None:
    """What the kernel tells of a process, from its state on (proc(5): stat from its field 3); None if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal, and would not just die of it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)
