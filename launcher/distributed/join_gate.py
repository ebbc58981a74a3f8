"""Join requests in the run directory: a joining node waits there until the workers have saved a checkpoint.

torchrun terminates the workers when a node joins and gives them 30 s: a save that takes longer would be lost.
"""

from __future__ import annotations

import time

from launcher.run_dir.lock import find_lock_owner
from launcher.run_dir.run_directory import RunDirectory
from launcher.system.atomic_files import make_durable_dir

__all__ = ["wait_to_join"]

JOIN_POLL_S = 0.1


def wait_to_join(run_dir: RunDirectory, name: str) -> None:
    """Wait until the workers that train in `run_dir` have saved and paused, or until no process trains there."""
    if find_lock_owner(run_dir.path) is None:
        return
    make_durable_dir(run_dir.join_requests_dir)
    request_file = run_dir.join_requests_dir / name
    request_file.touch()
    while request_file.exists() and find_lock_owner(run_dir.path) is not None:
        time.sleep(JOIN_POLL_S)
    request_file.unlink(missing_ok=True)
