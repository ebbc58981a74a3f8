"""The cleanup process of a worker, an agent or a measuring process: it ends what its owner leaves behind.

It is forked before its owner imports anything slow, waits until the owner has ended for any reason, SIGKILL included,
and then ends the processes that the owner started and removes its temporary files. It also ends the owner itself: if
the owner's torchrun is gone, and if the owner still runs some time after SIGTERM, because the interpreter is held by a
library or waits in a collective.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from launcher.distributed.leftovers import MARK_ENV, JobMark, end_leftovers
from launcher.distributed.starter import find_agent
from launcher.system.processes import identify_process

__all__ = ["CleanupProcess", "private_temp_dir", "use_private_temp_dir"]

LIMIT_MESSAGE, REMOVE_MESSAGE = 0x80, 0x81  # above every signal number
LIMIT_STRUCT, LENGTH_STRUCT = struct.Struct("=d"), struct.Struct("=H")
#: A socket's path has 107 bytes at most, of which multiprocessing's name for it takes up to 18.
MAX_SOCKET_DIR_BYTES = 88
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.5  # where the kernel has no pidfd


class CleanupProcess:
    """A process's handle of its cleanup process, which reads signals and messages from `pipe`."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    @classmethod
    def start(cls) -> CleanupProcess | None:
        """Fork the cleanup process of this process; None if no process can be forked.

        It is not a child of this process and has a session of its own, so that what ends this process does not end it.
        When this process exits by itself, it ends what it has started before that.
        """
        mark = JobMark.of_process(os.getpid())
        if mark is None:
            return None
        os.environ[MARK_ENV] = mark.identity
        agent, (reader, writer) = find_agent(os.getppid()), os.pipe()
        os.set_blocking(writer, False)
        try:
            child = os.fork()
        except OSError:
            return None
        if child == 0:
            run_cleanup_process(mark, agent, reader)
        os.waitpid(child, 0)
        os.close(reader)
        os.register_at_fork(after_in_child=forward_no_signals)
        atexit.register(end_own_leftovers, mark)
        return cls(writer)

    def limit_time_after_sigterm(self, seconds: float) -> None:
        """From now on, this process is killed if it still runs `seconds` after SIGTERM or SIGHUP."""
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        os.write(self._pipe, bytes([LIMIT_MESSAGE]) + LIMIT_STRUCT.pack(seconds))

    def remove_at_end(self, path: Path) -> None:
        """Remove this file or folder when this process has ended."""
        name = os.fsencode(path.absolute())
        os.write(self._pipe, bytes([REMOVE_MESSAGE]) + LENGTH_STRUCT.pack(len(name)) + name)


def end_own_leftovers(mark: JobMark) -> None:
    if os.getpid() == mark.owner:  # not in a fork of the owner
        end_leftovers([mark])


def private_temp_dir() -> Path | None:
    """A folder for temporary files of this process and its forks, removed by the cleanup process; None without one."""
    if MARK_ENV not in os.environ:
        return None
    folder = locate_private_dir(os.environ[MARK_ENV])
    folder.mkdir(0o700, exist_ok=True)
    return folder if folder.lstat().st_uid == os.getuid() else None  # else another user has made it


def use_private_temp_dir() -> None:
    """Have multiprocessing keep its sockets in `private_temp_dir`: its own folder stays where a process is killed."""
    import multiprocessing

    if (folder := private_temp_dir()) is not None:
        multiprocessing.current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined]


def locate_private_dir(identity: str) -> Path:
    """The folder's path: in TMPDIR, or in /tmp where the path of a socket in it would be longer than Linux allows."""
    folder = Path(os.environ.get("TMPDIR") or "/tmp") / f"launcher-{identity}"
    return folder if len(os.fsencode(folder)) <= MAX_SOCKET_DIR_BYTES else Path("/tmp") / folder.name


def forward_no_signals() -> None:
    """In a fork of the owner: the signals that it receives are not the owner's."""
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)


# --- in the cleanup process -----------------------------------------------------------------------------------------


def run_cleanup_process(mark: JobMark, agent: int | None, pipe: int) -> NoReturn:
    """Detach from the owner by a second fork, wait for its end, and remove what it has left."""
    try:
        os.setsid()
        if os.fork() == 0:
            detach_from_owner(pipe)
            watch = OwnerWatch(mark, agent, pipe)
            watch.wait_for_end()
            end_leftovers([mark])
            remove_paths(watch.paths)
    finally:
        os._exit(0)


def detach_from_owner(pipe: int) -> None:
    """Keep only stderr and the pipe open, so that no reader of a pipe waits for this process; ignore signals."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    for descriptor in map(int, os.listdir("/proc/self/fd")):  # the limit may be a billion in a container
        if descriptor > 2 and descriptor != pipe:
            with suppress(OSError):
                os.close(descriptor)


def remove_paths(paths: set[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            import shutil

            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class OwnerWatch:
    """Waits for the end of the owner; ends it if its agent has ended, or too long after SIGTERM."""

    def __init__(self, mark: JobMark, agent: int | None, pipe: int) -> None:
        self.paths = {locate_private_dir(mark.identity)}
        self._mark = mark
        self._agent = agent
        self._agent_identity = None if agent is None else identify_process(agent)
        self._pipe = pipe
        self._limit_s: float | None = None
        self._deadline_s: float | None = None
        self._unread = b""
        self._poll = select.poll()
        self._poll.register(pipe, select.POLLIN)
        self._has_pidfds = self._register(mark.owner) and (agent is None or self._register(agent))

    def _register(self, pid: int) -> bool:
        """Wake up when a process ends; returns whether that is possible."""
        try:
            self._poll.register(os.pidfd_open(pid), select.POLLIN)
        except (OSError, AttributeError):
            return False
        return True

    def wait_for_end(self) -> None:
        """Wait until the owner has ended."""
        while identify_running(self._mark.owner) == self._mark.identity:
            if self._agent is not None and identify_running(self._agent) != self._agent_identity:
                self._kill_owner()
            if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
                self._report_and_kill_owner()
            for descriptor, event in self._poll.poll(self._timeout_ms()):
                if descriptor == self._pipe:
                    self._read_messages(event)

    def _timeout_ms(self) -> float | None:
        """Until the deadline; a short time where nothing wakes this process up when its owner ends."""
        left_s = None if self._deadline_s is None else max(POLL_S / 10, self._deadline_s - time.monotonic())
        polled_s = left_s if self._has_pidfds else min(POLL_S, left_s or POLL_S)
        return None if polled_s is None else 1000 * polled_s

    def _read_messages(self, event: int) -> None:
        data = os.read(self._pipe, 4096) if event & select.POLLIN else b""
        if not data:
            self._poll.unregister(self._pipe)  # the owner has closed it, or has ended
        self._unread += data
        while self._unread and self._take_message():
            pass

    def _take_message(self) -> bool:
        """Act on the first message: a signal number or a method's message; False if it is still incomplete."""
        kind, rest = self._unread[0], self._unread[1:]
        if kind == LIMIT_MESSAGE:
            if len(rest) < LIMIT_STRUCT.size:
                return False
            (self._limit_s,) = LIMIT_STRUCT.unpack_from(rest)
            rest = rest[LIMIT_STRUCT.size :]
        elif kind == REMOVE_MESSAGE:
            length = LENGTH_STRUCT.unpack_from(rest)[0] if len(rest) >= LENGTH_STRUCT.size else len(rest)
            if len(rest) < LENGTH_STRUCT.size + length:
                return False
            rest = rest[LENGTH_STRUCT.size :]
            self.paths.add(Path(os.fsdecode(rest[:length])))
            rest = rest[length:]
        elif kind in ENDING_SIGNALS and self._limit_s is not None and self._deadline_s is None:
            self._deadline_s = time.monotonic() + self._limit_s
        self._unread = rest
        return True

    def _report_and_kill_owner(self) -> None:
        if self._kill_owner():
            line = f"error: process {self._mark.owner} still ran {self._limit_s:g} s after SIGTERM and was killed\n"
            with suppress(OSError):
                os.write(2, line.encode())

    def _kill_owner(self) -> bool:
        """Kill the owner and wait until it has ended; returns whether it still ran."""
        if identify_running(self._mark.owner) != self._mark.identity:
            return False
        with suppress(ProcessLookupError):
            os.kill(self._mark.owner, signal.SIGKILL)
        while identify_running(self._mark.owner) == self._mark.identity:
            time.sleep(POLL_S / 25)
        return True


def identify_running(pid: int) -> str | None:
    """`identify_process`, but None for a process that has ended and has not been waited for."""
    return identify_process(pid, running=True)
