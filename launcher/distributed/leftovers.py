"""What a process of the job leaves behind when it ends: the processes that it started, recognised by a mark."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.system.processes import identify_process, read_proc_stat
from launcher.topology import read_slurm_step

__all__ = ["MARK_ENV", "JobMark", "end_leftovers"]

#: Marks the processes that a process of the job has started: they inherit its environment.
MARK_ENV = "LAUNCHER_STARTED_BY"
POLITE_S = 1.0  # from SIGTERM to SIGKILL of processes that are left
GIVE_UP_S = 5.0  # a process that cannot be killed waits in the kernel, e.g. for a broken disk
POLL_S = 0.02


@dataclass(frozen=True)
class JobMark:
    """How the processes that `owner` has started are recognised.

    `identity` is the owner's pid and start time, which its processes inherit as a variable. `session` is its session if
    it leads one, as torchrun's workers do. A job that it has submitted to Slurm inherits the variable too, but belongs
    to another `slurm_step`.
    """

    owner: int
    identity: str
    session: int | None
    slurm_step: str

    @classmethod
    def of_process(cls, pid: int) -> JobMark | None:
        """The mark of a process; None if it is gone."""
        stat, identity = read_proc_stat(pid), identify_process(pid)
        if stat is None or identity is None:
            return None
        return cls(pid, identity, pid if int(stat[3]) == pid else None, read_slurm_step())

    def matches(self, pid: int) -> bool:
        """Whether the owner has started this process, or one of those that it started."""
        stat = read_proc_stat(pid)
        if pid in (self.owner, os.getpid()) or stat is None or stat[0] in ("Z", "X"):
            return False
        return (self.session is not None and int(stat[3]) == self.session) or self._is_inherited_by(pid)

    def _is_inherited_by(self, pid: int) -> bool:
        env = read_environment(pid)
        return env.get(MARK_ENV) == self.identity and read_slurm_step(env) == self.slurm_step


def read_environment(pid: int) -> Mapping[str, str]:
    """The environment with which a process was started; empty if it is gone or belongs to another user."""
    try:
        lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line)


def end_leftovers(marks: Collection[JobMark]) -> None:
    """End the processes that match any of the marks: by SIGTERM, and a second later by SIGKILL."""
    started_s, asked = time.monotonic(), set[int]()
    while left := list_leftovers(marks):
        waited_s = time.monotonic() - started_s
        if waited_s > GIVE_UP_S:
            return
        for pid in left:
            if waited_s > POLITE_S or pid not in asked:
                asked.add(pid)
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL if waited_s > POLITE_S else signal.SIGTERM)
        time.sleep(POLL_S)


def list_leftovers(marks: Collection[JobMark]) -> list[int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()] if marks else []
    return [pid for pid in pids if any(mark.matches(pid) for mark in marks)]
