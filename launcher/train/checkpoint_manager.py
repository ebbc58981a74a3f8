"""Decide when to save checkpoints, and write them in a background thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launcher.checkpoint import tensor_io
from launcher.checkpoint.sharded import ShardInfo, save_shard, save_sharded_checkpoint
from launcher.checkpoint.staging import StagingBuffers
from launcher.config.schema import CheckpointConfig
from launcher.plan.batch import BatchPlan
from launcher.plan.training_plan import TrainingPlan
from launcher.run_dir.run_directory import RunDirectory
from launcher.strategies.interface import Replica, ReplicaState
from launcher.system.fault_injection import FaultInjector
from launcher.telemetry.metrics_logger import MetricsLogger
from launcher.topology import Topology
from launcher.train.metrics_recorder import plan_to_dict
from launcher.train.state import TrainState

__all__ = ["CheckpointManager", "CheckpointOptions", "format_checkpoint_name"]


@dataclass(frozen=True)
class CheckpointOptions:
    """How a run saves.

    `sharded`: every rank writes its own shard. `every_s` is `checkpoint.every` if that is a time. Rank 0 waits up to
    `shard_timeout_s` for the other ranks' shards. `identity` is stored in the checkpoint: the recipe, the seed and
    the lengths of the data.
    """

    settings: CheckpointConfig
    sharded: bool
    every_s: float | None
    shard_timeout_s: float
    identity: Mapping[str, Any]


class CheckpointManager:
    """Saves checkpoints on rank 0, readable by every rank and strategy; the other ranks help to gather the state.

    Training waits only until the state is copied; a thread then writes it, one save at a time, without collectives. A
    checkpoint is renamed to its final name only once the row of its update is in metrics.jsonl, so that neither exists
    without the other. A failed save raises an alarm; if it was the last save, it is an error. With `sharded`, every
    rank writes its own shard in a thread, and rank 0 merges them. If `checkpoint.every` is a time, rank 0 requests the
    save in its statistics of an update.
    """

    def __init__(
        self,
        run_dir: RunDirectory,
        options: CheckpointOptions,
        topology: Topology,
        logger: MetricsLogger | None,
        faults: FaultInjector,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_dir = run_dir
        self._checkpoints = run_dir.resolve_checkpoints_dir(options.settings.dir)
        self._options = options
        self._topology = topology
        self._logger = logger
        self._faults = faults
        self._clock = clock
        self._saved_at = clock()
        self._snapshot = StagingBuffers()
        self._writer: threading.Thread | None = None
        self._rows_are_written = threading.Event()
        self._closing = threading.Event()
        self._problem: Exception | None = None
        self._unsaved: tensor_io.CheckpointState | None = None

    def is_due(self) -> bool:
        """Return whether a timed save is due; decided by rank 0 for all ranks."""
        every_s = self._options.every_s
        return self._topology.rank == 0 and every_s is not None and self._clock() - self._saved_at >= every_s

    def save(self, replica: Replica, training_plan: TrainingPlan, state: TrainState, plan: BatchPlan) -> None:
        """Copy the state and start writing it; every rank must call this, since the state may have to be gathered.

        Raises:
            UsageError: the previous state could not be serialised.
        """
        replica.broadcast_buffers()
        self._saved_at = self._clock()
        self._join_writer()
        if self._problem is not None and not isinstance(self._problem, tensor_io.CheckpointError):
            raise self._problem
        (model, optimizer, facts), shard = self._get_state(replica)
        if self._topology.rank > 0 and shard is None:
            return
        position = state.position
        saved = tensor_io.CheckpointState(
            model=self._snapshot.stage("model", model),
            optimizer=self._snapshot.stage("optimizer", optimizer),
            position={"samples": position.samples, "update": position.update},
            plan=plan_to_dict(training_plan, state.schedule, plan),
            world=plan.world,
            facts={**self._options.identity, **facts, "standing": state.state_dict()},
        )
        protect = frozenset([state.best_checkpoint] if state.best_checkpoint else [])
        self._rows_are_written.clear()
        name = format_checkpoint_name(state)
        self._writer = threading.Thread(
            target=self._write_checkpoint, args=(name, saved, shard, protect), name="checkpoint"
        )
        self._writer.start()

    def _get_state(self, replica: Replica) -> tuple[ReplicaState, ShardInfo | None]:
        """The full state, or with `sharded` this rank's shard."""
        if not self._options.sharded:
            return replica.full_state(), None
        state, places = replica.sharded_state()
        deadline_s = self._clock() + self._options.shard_timeout_s

        def check_timeout() -> None:
            if self._closing.is_set() or self._clock() > deadline_s:
                raise tensor_io.CheckpointError("the other ranks have not written their checkpoint shards")

        topology = self._topology
        return state, ShardInfo(topology.rank, topology.world, str(topology.generation), places, check_timeout)

    def rows_written(self) -> None:
        """Signal that the rows of all finished updates have been recorded."""
        self._rows_are_written.set()

    def wait(self) -> None:
        """Wait for the last save.

        Raises:
            CheckpointError: the save failed.
        """
        self._join_writer()
        if self._problem is not None:
            raise self._problem

    def export_unsaved(self, paths: Sequence[Path]) -> Path | None:
        """Write the parameters of the last save, which failed, to the first of these files that there is room for.

        Returns None if there is room for none, or if each rank saves its own shard.
        """
        if self._unsaved is None or self._options.sharded:
            return None
        for path in paths:
            with suppress(OSError):
                tensor_io.export_tensors(path, self._unsaved.model, self._unsaved.facts.get("buffers", {}))
                return path
        return None

    def close(self) -> None:
        """Wait for the current save to end, whether or not it succeeds."""
        self._closing.set()
        self.rows_written()
        self._join_writer()

    def _join_writer(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write_checkpoint(
        self, name: str, saved: tensor_io.CheckpointState, shard: ShardInfo | None, protect: frozenset[str]
    ) -> None:
        self._problem = self._unsaved = None
        try:
            self._snapshot.wait()
            phase = partial(self._on_phase, saved.position["update"])
            if self._topology.rank > 0 and shard is not None:
                save_shard(self._checkpoints, name, saved, shard, phase)
                return
            options = tensor_io.SaveOptions(self._options.settings.keep, protect, phase)
            if shard is None:
                report = tensor_io.save_checkpoint(self._checkpoints, name, saved, options)
            else:
                report = save_sharded_checkpoint(self._checkpoints, name, saved, shard, options)
        except Exception as problem:
            self._problem, self._unsaved = problem, saved
            self._log_event("alarm", kind="checkpoint", detail=str(problem))
            return
        with suppress(OSError):  # a full disk: more restarts than necessary are then counted without a checkpoint
            self._run_dir.record_saved_generation(self._topology.generation)
        size = {"seconds": report.seconds, "bytes": report.bytes}
        self._log_event("checkpoint", name=name, **saved.position, **size)

    def _on_phase(self, update: int, phase: str) -> None:
        if phase == "checkpoint-rename":
            self._rows_are_written.wait()
            if self._logger is not None:
                self._logger.flush()
        self._faults.inject_at(phase, update)

    def _log_event(self, name: str, /, **facts: Any) -> None:
        if self._logger is not None:
            self._logger.log_event(name, **facts)


def format_checkpoint_name(state: TrainState) -> str:
    """The checkpoint's name, which contains the zero-padded update number so that names sort by age."""
    return f"update-{state.position.update:08d}"
