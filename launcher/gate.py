"""The gate in the run folder, where a node that would join waits until the workers have saved.

torchrun has workers leave when a node joins, and gives them 30 s: a save that takes longer would be lost.
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
OPEN_S = 60.0  # for a node's torchrun to start and to come to the rendezvous


def knock(folder: RunFolder, name: str) -> None:
    """Wait until the workers that train in the folder have saved and stand still; no longer than somebody trains."""
    if owner(folder) is None:
        return
    private_folder(folder.gate)
    mark = folder.gate / name
    mark.touch(0o600)
    while mark.exists() and owner(folder) is not None:
        time.sleep(LOOK_EVERY_S)
    mark.unlink(missing_ok=True)


def hold(job: Job, standing: Standing) -> int:
    """Let the nodes in that wait, after the save; the agents have the workers leave when they come. LEAVE then.

    JOIN where none came: training goes on. A save that failed was an alarm already, and is tried again when it is due.
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
    job.saver.journal.event("alarm", kind="gate", detail=f"{names} asked to join and did not come in {OPEN_S:g} s")
    job.wishes.granted()
    return JOIN
