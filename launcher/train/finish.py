"""The end of training on rank 0: the final parameters and done.json, or the event that training was stopped."""

from __future__ import annotations

import tempfile
from pathlib import Path

from launcher.checkpoint import tensor_io
from launcher.checkpoint.manifest import VerifiedCheckpoint, latest_path, open_checkpoint
from launcher.errors import TrainingFailed
from launcher.run_dir.restart_cost import sum_restart_costs
from launcher.strategies.extra_state import make_extra_metadata
from launcher.train.checkpoint_manager import CheckpointManager, format_checkpoint_name
from launcher.train.context import TrainContext
from launcher.train.outcome import TrainOutcome
from launcher.train.rank_setup import RankJob
from launcher.train.state import TrainState
from launcher.train.update_reports import count_unapplied_updates

__all__ = ["finish_run"]


def finish_run(
    job: RankJob, manager: CheckpointManager, context: TrainContext, state: TrainState, outcome: TrainOutcome
) -> None:
    """Wait for the last save; then, on rank 0, write the final parameters and done.json, or log the stop.

    Raises:
        TrainingFailed: something could not be written, e.g. because the disk is full; a restart would not help.
    """
    try:
        manager.wait()
        job.faults.inject_at("finish")
        if job.topology.rank == 0:
            write_end(job, context, state, outcome)
    except OSError as problem:
        if outcome == TrainOutcome.RESTART or not is_disk_error(problem):
            raise
        raise TrainingFailed(describe_unwritten(job, manager, problem, outcome)) from problem


def is_disk_error(problem: OSError) -> bool:
    """Whether a file could not be written; else another rank is gone, e.g. one whose shard is missing."""
    cause = problem.__cause__ if isinstance(problem, tensor_io.CheckpointError) else problem
    return isinstance(cause, OSError) and not isinstance(cause, ConnectionError)


def describe_unwritten(job: RankJob, manager: CheckpointManager, problem: OSError, outcome: TrainOutcome) -> str:
    """Say what could not be written and how to go on; keep the parameters of completed training where there is room."""
    run_dir, what = job.spec.run_dir, str(problem)
    newest = latest_path(run_dir.resolve_checkpoints_dir(job.spec.config.checkpoint.dir))
    start = "the start, since no checkpoint was saved" if newest is None else f"the intact checkpoint {newest.name}"
    again = f"free some space and type the same command with run.dir={run_dir.path}, which continues from {start}"
    if outcome != TrainOutcome.COMPLETE:
        return f"the state at the stop is lost: {what}; {again}"
    elsewhere = Path(tempfile.gettempdir()) / f"{run_dir.path.name}-{run_dir.model.name}"
    kept = manager.export_unsaved([run_dir.model, elsewhere]) if job.topology.rank == 0 else None
    where = f"the final parameters are in {kept}; " if kept is not None else ""
    return f"training is complete, but {what}; {where}{again}"


def write_end(job: RankJob, context: TrainContext, state: TrainState, outcome: TrainOutcome) -> None:
    """Write the final parameters and done.json, or log that training was stopped."""
    run_dir, position = context.run_dir, state.position
    if outcome != TrainOutcome.COMPLETE:
        why = run_dir.read_stop_reason() or context.stop_requests.reason or "another rank"
        unapplied = count_unapplied_updates(context, state)
        context.log_event("preempt", why=why, samples=position.samples, update=position.update, **unapplied)
        return
    export_parameters(job, state, run_dir.resolve_checkpoints_dir(context.config.checkpoint.dir))
    done = {
        "samples": position.samples,
        "updates": position.update,
        "seconds": context.meter.seconds(),
        "metrics": dict(state.metrics),
        "restarts": run_dir.read_restarts(),
        **count_unapplied_updates(context, state),
        **sum_restart_costs(run_dir.metrics),
    }
    if state.target_reached is not None:
        done["target"] = dict(state.target_reached)
    context.log_event("done", **done)
    run_dir.write_done(done)


def export_parameters(job: RankJob, state: TrainState, checkpoints_dir: Path) -> None:
    """Write the parameters of the final checkpoint, and of the best one if there is one, as safetensors files."""
    run_dir = job.spec.run_dir
    final_path = checkpoints_dir / format_checkpoint_name(state)
    resumed = job.setup.checkpoint
    # The final checkpoint is absent if training had already ended at a checkpoint that the user named.
    final = resumed if resumed is not None and not final_path.is_dir() else open_checkpoint(final_path)
    export_checkpoint(final, run_dir.model)
    if state.best_checkpoint is not None:
        export_checkpoint(open_checkpoint(checkpoints_dir / state.best_checkpoint), run_dir.best_model)


def export_checkpoint(checkpoint: VerifiedCheckpoint, path: Path) -> None:
    loaded = tensor_io.load_checkpoint(checkpoint)
    facts = loaded.manifest.facts
    metadata = make_extra_metadata(facts.get("extra", {}), loaded.optimizer)
    tensor_io.export_safetensors(path, loaded.model, facts.get("buffers", {}), metadata)
