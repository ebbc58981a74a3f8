"""Decide when to save checkpoints, and write them in a background thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from launcher import checkpoint
from launcher.batch import BatchPlan
from launcher.faults import Faults
from launcher.parts import Part, save_part, save_together
from launcher.record import Silent, plan_facts
from launcher.runfolder import RunFolder
from launcher.settings import CheckpointSettings
from launcher.sinks.journal import Journal
from launcher.snapshot import Snapshot
from launcher.standing import Standing
from launcher.strategies import Replica, State
from launcher.study import Study

__all__ = ["Saver", "name_of"]


class Saver:
    """Saves checkpoints on rank 0, readable by every rank and strategy; the other ranks help to gather the state.

    Training waits only until the state is copied; a thread then writes it, one save at a time, without collectives. A
    checkpoint is renamed to its final name only once the row of its update is in metrics.jsonl, so that neither exists
    without the other. A failed save raises an alarm; if it was the last save, it is an error. With `sharded`, every
    rank writes its own shard in a thread, and rank 0 merges them.
    `every_s` is `checkpoint.every` if that is a time: rank 0 then requests the save in its gathered statistics.
    """

    def __init__(
        self,
        folder: RunFolder,
        settings: CheckpointSettings,
        journal: Journal | Silent,
        *,
        rank: int,
        world: int,
        sharded: bool,
        generation: int,
        patience_s: float,
        every_s: float | None,
        identity: dict[str, Any],
        faults: Faults,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.journal = journal
        self.folder = folder.path
        self.asks: RunFolder | None = folder if rank == 0 else None
        self._folder = folder
        self._generation = generation
        self._checkpoints = folder.checkpoints_in(settings.dir)
        self._settings = settings
        self._rank = rank
        self._world = world
        self._sharded = sharded
        self._patience_s = patience_s
        self._every_s = every_s
        self._identity = identity
        self._faults = faults
        self._clock = clock
        self._saved_at = clock()
        self._snapshot = Snapshot()
        self._writing: threading.Thread | None = None
        self._told = threading.Event()
        self._closing = threading.Event()
        self._problem: Exception | None = None

    def wants(self) -> bool:
        """Return whether a timed save is due; decided by rank 0 for all ranks."""
        return self._rank == 0 and self._every_s is not None and self._clock() - self._saved_at >= self._every_s

    def save(self, replica: Replica, study: Study, standing: Standing, plan: BatchPlan) -> None:
        """Copy the state and start writing it; every rank must call this, since the state may have to be gathered.

        Raises:
            UsageError: the previous state could not be serialised.
        """
        replica.settle_buffers()
        self._saved_at = self._clock()
        self._join()
        if self._problem is not None and not isinstance(self._problem, checkpoint.CheckpointError):
            raise self._problem
        (model, optimizer, facts), part = self._state(replica)
        if self._rank > 0 and part is None:
            return
        position = standing.position
        saved = checkpoint.Saved(
            model=self._snapshot.take("model", model),
            optimizer=self._snapshot.take("optimizer", optimizer),
            position={"samples": position.samples, "update": position.update},
            plan=plan_facts(study, standing.schedule, plan),
            world=plan.world,
            facts={**self._identity, **facts, "standing": standing.facts()},
        )
        protect = frozenset([standing.best_checkpoint] if standing.best_checkpoint else [])
        self._told.clear()
        name = name_of(standing)
        self._writing = threading.Thread(target=self._write, args=(name, saved, part, protect), name="checkpoint")
        self._writing.start()

    def _state(self, replica: Replica) -> tuple[State, Part | None]:
        """The full state, or with `sharded` this rank's shard."""
        if not self._sharded:
            return replica.tensors(), None
        state, places = replica.shards()
        until_s = self._clock() + self._patience_s

        def patience() -> None:
            if self._closing.is_set() or self._clock() > until_s:
                raise checkpoint.CheckpointError("the other ranks have not written their checkpoint shards")

        return state, Part(self._rank, self._world, str(self._generation), places, patience)

    def told(self) -> None:
        """Signal that the rows of all finished updates have been recorded."""
        self._told.set()

    def settle(self) -> None:
        """Wait for the last save.

        Raises:
            CheckpointError: the save failed.
        """
        self._join()
        if self._problem is not None:
            raise self._problem

    def close(self) -> None:
        """Wait for the current save to end, whether or not it succeeds."""
        self._closing.set()
        self.told()
        self._join()

    def _join(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _write(self, name: str, saved: checkpoint.Saved, part: Part | None, protect: frozenset[str]) -> None:
        self._problem = None
        try:
            self._snapshot.wait()
            phase = partial(self._phase, saved.position["update"])
            if self._rank > 0 and part is not None:
                save_part(self._checkpoints, name, saved, part, phase)
                return
            keep = self._settings.keep
            if part is None:
                report = checkpoint.save(self._checkpoints, name, saved, keep, protect, phase)
            else:
                report = save_together(self._checkpoints, name, saved, part, keep, protect, phase)
        except Exception as problem:
            self._problem = problem
            self.journal.event("alarm", kind="checkpoint", detail=str(problem))
            return
        self._folder.saved(self._generation)
        size = {"seconds": report.seconds, "bytes": report.bytes}
        self.journal.event("checkpoint", name=name, **saved.position, **size)

    def _phase(self, update: int, phase: str) -> None:
        if phase == "checkpoint-rename":
            self._told.wait()
            self.journal.flush()
        self._faults(phase, update)


def name_of(standing: Standing) -> str:
    """The checkpoint's name, which contains the zero-padded update number so that names sort by age."""
    return f"update-{standing.position.update:08d}"
