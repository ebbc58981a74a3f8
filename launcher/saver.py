"""When and what a run saves: its checkpoints, the best one among them, and what is left when it has finished."""

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
    """Writes on rank 0, whose files serve every rank and every strategy; the others take part in gathering the state.

    Training waits for a copy of the state alone; a thread writes it, one at a time, and runs no collective. A
    checkpoint takes its name only when the row of its update is in metrics.jsonl: neither may be there without the
    other. A save that fails is an alarm, and an error where it was the last one. With `sharded` every rank writes what
    it holds, in a thread of its own, and rank 0 puts it together.
    `every_s` is `checkpoint.every` where that is a time: rank 0 then raises its wish in the vote.
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
        """Whether it is time to save, by the clock; rank 0 speaks for all."""
        return self._rank == 0 and self._every_s is not None and self._clock() - self._saved_at >= self._every_s

    def save(self, replica: Replica, study: Study, standing: Standing, plan: BatchPlan) -> None:
        """Copy the state and have it written; every rank calls it, since it may have to be gathered.

        Raises:
            RequestError: the state that was saved before cannot be saved at all.
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
        """The whole state, or with `sharded` this rank's part."""
        if not self._sharded:
            return replica.tensors(), None
        state, places = replica.shards()
        until_s = self._clock() + self._patience_s

        def patience() -> None:
            if self._closing.is_set() or self._clock() > until_s:
                raise checkpoint.CheckpointError("the other ranks have not written their parts")

        return state, Part(self._rank, self._world, str(self._generation), places, patience)

    def told(self) -> None:
        """The rows of all finished updates have been handed over."""
        self._told.set()

    def settle(self) -> None:
        """Wait for the last save.

        Raises:
            CheckpointError: it failed.
        """
        self._join()
        if self._problem is not None:
            raise self._problem

    def close(self) -> None:
        """Wait for what is being written, whatever comes of it."""
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
    """A checkpoint's name: it counts updates, so that names sort by age."""
    return f"update-{standing.position.update:08d}"
