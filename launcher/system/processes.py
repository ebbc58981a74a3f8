"""Process utilities for one Linux machine: killing children with their parent, start times, states."""

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
    "MemoryFile",
    "count_cores",
    "die_with_parent",
    "handles_signal",
    "has_open_file",
    "is_running",
    "is_same_process",
    "kill_process_tree",
    "list_child_pids",
    "open_pidfd",
    "read_command_line",
    "read_cpu_seconds",
    "read_sibling_state",
    "read_start_time",
    "reset_after_fork",
]

PR_SET_PDEATHSIG = 1
CHILD_POLL_INTERVAL_S = 0.05
CHILD_EXIT_TIMEOUT_S = 3.0


def count_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends for any reason.

    The parent may have ended between its fork and this call; then this process kills itself at once. Pass the
    parent's pid as `parent` where it is known, e.g. in a forked process.
    """
    expected = parent or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != expected:
        os.kill(os.getpid(), signal.SIGKILL)


def reset_after_fork(parent: int) -> None:
    """Make a process forked from `parent` behave as if it had been exec'ed: default signal handlers, dies with it.

    Python signal handlers inherited from the parent are reset; ignored signals stay ignored, as they do after exec.
    """
    die_with_parent(parent)
    for signum in signal.valid_signals():
        if callable(signal.getsignal(signum)):
            signal.signal(signum, signal.SIG_DFL)


def kill_process_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children and wait until all are gone; does nothing if the process has already ended.

    Meant for a process whose children die with it (`die_with_parent`): once it has ended, the kernel kills them too.
    """
    if process.poll() is not None:
        return
    pids = list_child_pids(process.pid)
    process.kill()
    process.wait()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + CHILD_EXIT_TIMEOUT_S
    while any(map(is_running, pids)) and time.monotonic() < deadline_s:
        time.sleep(CHILD_POLL_INTERVAL_S)


def has_open_file(matches: Callable[[str], bool]) -> bool:
    """Whether this process has an open file whose path satisfies `matches`."""
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own descriptor is closed by now
            if matches(os.readlink(f"/proc/self/fd/{fd}")):
                return True
    return False


def list_child_pids(pid: int) -> list[int]:
    """The pids of a process's children; empty if the process is gone."""
    pids: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            pids += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return pids


def read_command_line(pid: int) -> tuple[str, ...]:
    """The arguments that a process was started with; empty if it is gone."""
    try:
        return tuple(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1])
    except OSError:
        return ()


def identify_process(pid: int, *, running: bool = False) -> str | None:
    """Pid and start time, which identify a process uniquely; None if it is gone, or with `running` if it has ended."""
    stat = read_proc_stat(pid)
    return None if stat is None or (running and stat[0] in ("Z", "X")) else f"{pid}-{stat[19]}"


def is_same_process(identity: str) -> bool:
    """Whether the process with this pid and start time still runs."""
    pid = identity.partition("-")[0]
    return pid.isdecimal() and identify_process(int(pid), running=True) == identity


def open_pidfd(identity: str) -> int | None:
    """A descriptor that becomes readable when a process ends; None if it has ended.

    `identity` is its pid and start time, so that another process with its pid is not taken for it.

    Raises:
        OSError: the kernel has no pidfd, before Linux 5.3.
    """
    pid = identity.partition("-")[0]
    try:
        descriptor = os.pidfd_open(int(pid))
    except (ProcessLookupError, ValueError, OverflowError):
        return None
    if is_same_process(identity):
        return descriptor
    os.close(descriptor)
    return None


def read_start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; with the pid it identifies a process uniquely."""
    stat = read_proc_stat(pid)
    return None if stat is None else int(stat[19])


def read_cpu_seconds(pid: int) -> float | None:
    """CPU seconds that a process has used so far, with a resolution of 10 ms; None if it is gone."""
    stat = read_proc_stat(pid)
    return None if stat is None else (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def is_running(pid: int) -> bool:
    """Whether a process exists and has not ended; a zombie (not yet waited for) does not count."""
    stat = read_proc_stat(pid)
    return stat is not None and stat[0] not in ("Z", "X")


def read_sibling_state(pid: int) -> str | None:
    """The kernel's state letter (T: stopped, Z: zombie) of a child of our own parent; None if it is gone."""
    stat = read_proc_stat(pid)
    return None if stat is None or int(stat[1]) != os.getppid() else stat[0]


def read_proc_stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the state on (field 3 in proc(5)); None if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def handles_signal(pid: int, signum: int) -> bool:
    """Whether a process has installed a handler for a signal, so that the signal would not just kill it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (signum - 1) & 1)


class MemoryFile:
    """A file in memory: private to this user, never on disk, gone with this process; it may hold secrets.

    Other processes of the user open it by its `path`, also to append to it when a disk is full.
    """

    def __init__(self, text: str = "") -> None:
        self._fd = os.memfd_create("launcher")
        os.write(self._fd, text.encode())
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._fd}")

    def close(self) -> None:
        os.close(self._fd)
