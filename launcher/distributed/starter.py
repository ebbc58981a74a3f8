"""Binds a process of the job to the one that started it: the driver, its agent, a worker, or a user's torchrun."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from launcher.system.processes import die_with_parent, identify_process, read_proc_stat
from launcher.topology import is_torchrun_worker

__all__ = ["die_with_starter", "find_agent", "make_starter_env"]

#: Names the process that started this one, by pid and start time.
STARTER_ENV = "LAUNCHER_STARTER"


def make_starter_env() -> dict[str, str]:
    """Environment that tells a process which one has started it, for `die_with_starter`."""
    identity = identify_process(os.getpid())
    return {} if identity is None else {STARTER_ENV: identity}


def die_with_starter() -> bool:
    """Have the kernel kill this process when the driver or torchrun that started it ends; call it before slow imports.

    The starter may have ended before this process reached its first line. A driver passes its identity; the torchrun
    of a user does not, but is the only ancestor that has loaded torch. Returns False if this is no process of a job.
    """
    starter = os.environ.pop(STARTER_ENV, None)
    if starter is None and not is_torchrun_worker():
        return False
    parent = os.getppid()
    die_with_parent(parent)
    has_starter = find_agent(parent) is not None if starter is None else identify_process(parent) == starter
    if not has_starter and parent != 0:  # 0: the parent is in another PID namespace
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def find_agent(pid: int) -> int | None:
    """The nearest process that has loaded torch, of this process and its ancestors.

    None if there is none, or if one of them is just ending: it may be the agent, which has lost its memory by then, and
    a process that has started torchrun may have loaded torch too.
    """
    while pid > 0 and (stat := read_proc_stat(pid)) is not None and (loaded := has_torch_loaded(pid)) is not None:
        if loaded:
            return pid
        pid = int(stat[1])
    return None


def has_torch_loaded(pid: int) -> bool | None:
    """Whether a process has loaded torch; of a process of another user, whether its command line is Python's.

    None if the process has no memory any more.
    """
    try:
        maps = Path(f"/proc/{pid}/maps").read_bytes()
        return b"libtorch" in maps if maps else None
    except PermissionError:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"python" in command or b"torch" in command
    except OSError:
        return None
