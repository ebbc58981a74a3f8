"""Rendezvous store of a pool, whose nodes join and leave: a TCPStore in its own process.

Each task of the pool starts such a process. The one that holds the lock in the run directory serves and writes its
address there; the others wait for the lock, so that one of them takes over when that task ends for any reason.
"""

from __future__ import annotations

import fcntl
import os
import time
from datetime import timedelta
from pathlib import Path

from launcher.system.atomic_files import SHARED_MODE, atomic_write_text
from launcher.system.processes import die_with_parent

__all__ = ["serve_store", "wait_for_endpoint"]

POOL_POLL_INTERVAL_S = 0.3
STORE_TIMEOUT = timedelta(seconds=600)


def serve_store(run_dir: Path, host: str) -> None:
    """Wait until no other process serves, then serve on all interfaces of `host` until the parent ends."""
    die_with_parent()
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    lock_fd = os.open(run_dir / ".store.lock", flags, SHARED_MODE)
    while not try_lock(lock_fd):
        time.sleep(POOL_POLL_INTERVAL_S)
    (run_dir / "rendezvous").unlink(missing_ok=True)  # address of the previous server
    from torch.distributed import TCPStore

    store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT)
    atomic_write_text(run_dir / "rendezvous", f"{host}:{store.port}\n")
    while True:
        time.sleep(3600)


def wait_for_endpoint(run_dir: Path) -> str:
    """Return `host:port` of the serving store; wait until there is one."""
    while True:
        lock_fd = os.open(run_dir / ".store.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, SHARED_MODE)
        try:
            if not try_lock(lock_fd) and (endpoint := read_or_empty(run_dir / "rendezvous")):
                return endpoint
        finally:
            os.close(lock_fd)
        time.sleep(POOL_POLL_INTERVAL_S)


def try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def read_or_empty(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
