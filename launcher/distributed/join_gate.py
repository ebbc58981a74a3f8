"""Join requests in the run directory: a joining node waits there until the workers have saved a checkpoint.

torchrun terminates the workers when a node joins and gives them 30 s: a save that takes longer would be lost.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from launcher.cli.control import find_lock_owner
from launcher.distributed.stop_requests import JOIN, LEAVE
from launcher.run_dir.run_directory import RunDirectory
from launcher.system.atomic_files import make_private_dir

if TYPE_CHECKING:
    from launcher.train.loop import TrainContext
    from launcher.train.state import TrainState

__all__ = ["admit_waiting_nodes", "wait_to_join"]

GATE_POLL_S = 0.1
JOIN_TIMEOUT_S = 60.0  # time for a node's torchrun to start and to reach the rendezvous


def wait_to_join(run_dir: RunDirectory, name: str) -> None:
    """Wait until the workers that train in `folder` have saved and paused, or until no process trains there."""
    if find_lock_owner(run_dir) is None:
        return
    make_private_dir(run_dir.join_requests_dir)
    mark = run_dir.join_requests_dir / name
    mark.touch(0o600)
    while mark.exists() and find_lock_owner(run_dir) is not None:
        time.sleep(GATE_POLL_S)
    mark.unlink(missing_ok=True)


def admit_waiting_nodes(context: TrainContext, state: TrainState) -> int:
    """Admit the waiting nodes after the save. Return RESTART once a node has joined and the agents end the workers.

    Return ADMIT_NODES if no node joined in time: training continues. A failed save has already raised an alarm and is
    retried when the next checkpoint is due.
    """
    with suppress(OSError):
        context.checkpoint_manager.wait()
    names = (
        ", ".join(context.checkpoint_manager.stop_source.admit_nodes())
        if context.checkpoint_manager.stop_source
        else ""
    )
    end_s = time.monotonic() + JOIN_TIMEOUT_S
    while context.stop_requests.level <= JOIN and time.monotonic() < end_s:
        context.watchdog.enter_phase("checkpoint", state.position.update)
        time.sleep(GATE_POLL_S)
    if context.stop_requests.level == LEAVE:
        return LEAVE
    detail = f"{names} asked to join but did not connect within {JOIN_TIMEOUT_S:g} s"
    context.checkpoint_manager.journal.log_event("alarm", kind="gate", detail=detail)
    context.stop_requests.clear_admit()
    return JOIN
