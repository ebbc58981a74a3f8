"""Processes of one machine: who dies with whom, and when one was started. Linux."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

__all__ = ["catches", "children", "cpu_s", "die_with_parent", "runs", "siblings_state", "started_at"]

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends.

    The parent may have ended already, between its fork and this call: then there is nobody to wait for.
    """
    before = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != before:
        os.kill(os.getpid(), signal.SIGKILL)


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
