"""Processes of one machine: who dies with whom, and when one was started. Linux."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

__all__ = ["catches", "children", "die_with_parent", "runs", "siblings_state", "started_at"]

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
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def runs(pid: int) -> bool:
    """Whether a process is there and has not ended: one that nobody waited for stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def siblings_state(pid: int) -> str | None:
    """The kernel's letter for the state of a child of our parent (T: stopped, Z: dead); None where it is gone."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return state if int(parent) == os.getppid() else None


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal, and would not just die of it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)
