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

from launcher.durable import write_whole
from launcher.process import die_with_parent

__all__ = ["endpoint", "serve"]

LOOK_EVERY_S = 0.3
TIMEOUT = timedelta(seconds=600)


def serve(run_dir: Path, host: str) -> None:
    """Wait until no other process serves, then serve on all interfaces of `host` until the parent ends."""
    die_with_parent()
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    held = os.open(run_dir / ".store.lock", flags, 0o600)
    while not taken(held):
        time.sleep(LOOK_EVERY_S)
    (run_dir / "rendezvous").unlink(missing_ok=True)  # address of the previous server
    from torch.distributed import TCPStore

    store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    write_whole(run_dir / "rendezvous", f"{host}:{store.port}\n")
    while True:
        time.sleep(3600)


def endpoint(run_dir: Path) -> str:
    """`host:port` of the serving store; waits until there is one."""
    while True:
        held = os.open(run_dir / ".store.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            if not taken(held) and (known := read(run_dir / "rendezvous")):
                return known
        finally:
            os.close(held)
        time.sleep(LOOK_EVERY_S)


def taken(number: int) -> bool:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
