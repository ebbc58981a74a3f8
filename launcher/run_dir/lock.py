"""The lock of a run directory: which process holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from launcher.errors import UsageError
from launcher.run_dir.run_directory import RunDirectory

__all__ = ["OWNER_PATTERN", "LockOwner", "RunDirLock", "acquire_lock", "find_lock_owner", "parse_lock_owner"]


OWNER_PATTERN = re.compile(r"process (\d+)(?: of torchrun (\d+))? on (\S+) since (.+)")


@dataclass(frozen=True)
class LockOwner:
    """The process that holds the lock of a run directory: the driver, or rank 0 where the user ran torchrun."""

    pid: int
    host: str
    since: str
    torchrun: int | None = None

    @property
    def is_local(self) -> bool:
        return self.host == socket.gethostname()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def find_lock_owner(run_dir: RunDirectory) -> LockOwner | None:
    """Return the process that holds the lock; None if it is free. The kernel releases the lock of a dead process."""
    try:
        with (run_dir.path / ".lock").open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                found = OWNER_PATTERN.match(file.read())
                return parse_lock_owner(found) if found else LockOwner(0, "another machine", "")
    except FileNotFoundError:
        pass
    return None


def parse_lock_owner(found: re.Match[str]) -> LockOwner:
    return LockOwner(int(found[1]), found[3], found[4], int(found[2]) if found[2] else None)


class RunDirLock:
    """An flock on the run directory; the kernel releases it when the process ends, for any reason."""

    def __init__(self, folder: Path, torchrun: int | None = None) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._file = open(os.open(folder / ".lock", flags, 0o600), "r+")  # noqa: SIM115 (held)
        try:
            acquire_lock(self._file)
        except OSError as problem:
            owner = self._file.read().strip() or "another process"
            self._file.close()
            if problem.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UsageError(
                    f"{folder} cannot be locked ({problem.strerror}): type run.dir= on a file system with locks"
                ) from problem
            raise UsageError(
                f"{folder} is in use by {owner}: wait for it, stop it, or type another run.name="
            ) from None
        os.register_at_fork(after_in_child=self._file.close)  # a loader process must not hold it after its rank died
        self._file.seek(0)
        self._file.truncate()
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        of = f" of torchrun {torchrun}" if torchrun else ""
        self._file.write(f"process {os.getpid()}{of} on {socket.gethostname()} since {since}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def acquire_lock(file: IO[str]) -> None:
    """Lock the file, with a few retries, because `launcher status` and `watch` hold the lock for a moment.

    Raises:
        OSError: another process keeps the lock, or the file system has no locks.
    """
    for _ in range(9):
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.03)
    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
