"""When and what a run saves: its checkpoints, the best one among them, and what is left when it has finished."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher import checkpoint
from launcher.batch import BatchPlan
from launcher.faults import Faults
from launcher.record import Silent, plan_facts
from launcher.runfolder import RunFolder
from launcher.settings import CheckpointSettings
from launcher.sinks.journal import Journal
from launcher.standing import Standing
from launcher.strategies import Replica
from launcher.study import Study

__all__ = ["Saver", "checkpoints_of", "name_of"]


class Saver:
    """Writes on rank 0, whose files serve every rank and every world size; on the others it only takes part.

    `every_s` is `checkpoint.every` where that is a time: rank 0 then raises its wish in the vote.
    """

    def __init__(
        self,
        folder: RunFolder,
        settings: CheckpointSettings,
        journal: Journal | Silent,
        *,
        writes: bool,
        every_s: float | None,
        identity: dict[str, Any],
        faults: Faults,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.journal = journal
        self.folder = folder.path
        self.stop_file: Path | None = folder.stop_file if writes else None
        self._checkpoints = checkpoints_of(folder, settings)
        self._settings = settings
        self._writes = writes
        self._every_s = every_s
        self._identity = identity
        self._faults = faults
        self._clock = clock
        self._saved_at = clock()

    def wants(self) -> bool:
        """Whether it is time to save, by the clock; rank 0 speaks for all."""
        return self._writes and self._every_s is not None and self._clock() - self._saved_at >= self._every_s

    def save(self, replica: Replica, study: Study, standing: Standing, plan: BatchPlan) -> None:
        """Write a checkpoint; every rank calls it, since running statistics are settled before."""
        replica.settle_buffers()
        self._saved_at = self._clock()
        if not self._writes:
            return
        self.journal.flush()  # rows that the checkpoint counts must not be lost after it
        model, optimizer, facts = replica.tensors()
        update = standing.position.update
        report = checkpoint.save(
            self._checkpoints,
            name_of(standing),
            checkpoint.Saved(
                model=model,
                optimizer=optimizer,
                position={"samples": standing.position.samples, "update": update},
                plan=plan_facts(study, standing.schedule, plan),
                world=plan.world,
                facts={**self._identity, **facts, "standing": standing.facts()},
            ),
            keep=self._settings.keep,
            protect=frozenset([standing.best_checkpoint] if standing.best_checkpoint else []),
            fault=lambda phase: self._faults(phase, update),
        )
        self.journal.event(
            "checkpoint",
            name=report.name,
            samples=standing.position.samples,
            update=update,
            seconds=report.seconds,
            bytes=report.bytes,
        )


def checkpoints_of(folder: RunFolder, settings: CheckpointSettings) -> Path:
    return Path(settings.dir) if settings.dir else folder.checkpoints


def name_of(standing: Standing) -> str:
    """A checkpoint's name: it counts updates, so that names sort by age."""
    return f"update-{standing.position.update:08d}"
