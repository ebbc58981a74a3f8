"""Join requests in the run directory: a joining node waits there until the workers have saved a checkpoint.

torchrun terminates the workers when a node joins and gives them 30 s: a save that takes longer would be lost.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from launcher.control import owner
from launcher.durable import private_folder
from launcher.runfolder import RunFolder
from launcher.signals import JOIN, LEAVE

if TYPE_CHECKING:
    from launcher.loop import Job
    from launcher.standing import Standing

__all__ = ["hold", "knock"]

LOOK_EVERY_S = 0.1
OPEN_S = 60.0  # time for a node's torchrun to start and to reach the rendezvous


def knock(folder: RunFolder, name: str) -> None:
    """Wait until the workers that train in `folder` have saved and paused, or until no process trains there."""
    if owner(folder) is None:
        return
    private_folder(folder.gate)
    mark = folder.gate / name
    mark.touch(0o600)
    while mark.exists() and owner(folder) is not None:
        time.sleep(LOOK_EVERY_S)
    mark.unlink(missing_ok=True)


def hold(job: Job, standing: Standing) -> int:
    """Admit the waiting nodes after the save. Return RESTART once a node has joined and the agents end the workers.

    Return ADMIT_NODES if no node joined in time: training continues. A failed save has already raised an alarm and is
    retried when the next checkpoint is due.
    """
    with suppress(OSError):
        job.saver.settle()
    names = ", ".join(job.saver.asks.let_in()) if job.saver.asks else ""
    end_s = time.monotonic() + OPEN_S
    while job.wishes.present <= JOIN and time.monotonic() < end_s:
        job.heart.phase("checkpoint", standing.position.update)
        time.sleep(LOOK_EVERY_S)
    if job.wishes.present == LEAVE:
        return LEAVE
    detail = f"{names} asked to join but did not connect within {OPEN_S:g} s"
    job.saver.journal.event("alarm", kind="gate", detail=detail)
    job.wishes.granted()
    return JOIN
