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
from launcher.system.atomic_files import SHARED_MODE

__all__ = ["LockOwner", "RunDirLock", "find_lock_owner"]

LOCK_FILE = ".lock"
OWNER_PATTERN = re.compile(r"process (\d+)(?: of torchrun (\d+))? on (\S+) since (.+)")


@dataclass(frozen=True)
class LockOwner:
    """The process that holds the lock of a run directory: the driver, or rank 0 where the user ran torchrun."""

    pid: int
    host: str
    since: str
    torchrun: int | None = None

    @classmethod
    def parse(cls, text: str) -> LockOwner:
        """Parse the content of the lock file; one that names no owner counts as held on another machine."""
        match = OWNER_PATTERN.match(text)
        if match is None:
            return cls(0, "another machine", "")
        return cls(int(match[1]), match[3], match[4], int(match[2]) if match[2] else None)

    @property
    def is_local(self) -> bool:
        return self.host == socket.gethostname()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def find_lock_owner(folder: Path) -> LockOwner | None:
    """Return the process that holds the lock of a run directory; None if it is free.

    The kernel releases the lock of a process that ends.
    """
    try:
        with (folder / LOCK_FILE).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # needs no right to write: others may look at the run
            except OSError:
                return LockOwner.parse(file.read())
    except FileNotFoundError:
        pass
    return None


class RunDirLock:
    """An flock on the run directory; the kernel releases it when the process ends, for any reason."""

    def __init__(self, folder: Path, torchrun: int | None = None) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._file = open(os.open(folder / LOCK_FILE, flags, SHARED_MODE), "r+")  # noqa: SIM115 (held)
        try:
            acquire_lock(self._file)
        except OSError as problem:
            owner = self._file.read().strip() or "another process"
            self._file.close()
            if problem.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UsageError(
                    f"{folder} cannot be locked ({problem.strerror}): "
                    "type run.dir= with a folder on a file system that supports locks"
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
