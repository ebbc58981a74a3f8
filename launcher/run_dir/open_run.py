"""Choose the run directory and decide whether to resume in it, before anything is created."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launcher import recipe as recipes
from launcher.checkpoint.manifest import CorruptCheckpointError, latest_path, read_manifest, resolve_checkpoint_path
from launcher.config.compose import from_yaml, to_yaml
from launcher.config.keys import flatten
from launcher.config.schema import RunConfig
from launcher.config.strategy_checks import missing_dependency
from launcher.errors import UsageError
from launcher.plan.training_plan import DatasetSizes, TrainingPlan, make_training_plan
from launcher.run_dir.lock import find_lock_owner
from launcher.run_dir.outward_links import refuse_outward_links
from launcher.run_dir.resume import ResumeDecision, check_data_length, decide_resume
from launcher.run_dir.run_directory import (
    RUNS_DIR,
    RunDirectory,
    format_recipe_name,
    unique_run_name,
)
from launcher.system.atomic_files import atomic_write_text
from launcher.system.stderr import print_stderr
from launcher.telemetry.wandb_env import get_wandb_run_id
from launcher.topology import get_batch_job_id, get_slurm_step_id

__all__ = ["OpenedRun", "open_run", "resolve_directory", "reuse_resolved_batch", "run_path", "write_run_files"]


@dataclass(frozen=True)
class OpenedRun:
    """A validated run that is ready to start: directory and name are decided, nothing is created yet.

    `done`: content of done.json if the run is already complete. `is_restart`: an earlier start of the job began it.
    """

    config: RunConfig
    recipe: Any
    sizes: DatasetSizes
    training_plan: TrainingPlan
    run_dir: RunDirectory
    decision: ResumeDecision
    done: Mapping[str, Any] | None = None
    is_restart: bool = False

    @property
    def is_complete(self) -> bool:
        return self.done is not None

    def format_summary(self) -> str:
        """Message for a run that is already complete."""
        done = self.done or {}
        measured = sorted(done.get("metrics", {}).items())
        metrics = "".join(f", {name} {value:.4g}" for name, value in measured if value is not None)
        return (
            f"{self.run_dir.path} is complete: {done['samples']} samples in {done['updates']} updates, "
            f"{done['seconds']:.1f} s{metrics}\n"
            f"increase train.duration to continue, or type resume=never for a new run in another directory"
        )


def open_run(
    config: RunConfig, world: int, *, existing: Path | None = None, run_id: str | None = None, nodes: int = 1
) -> OpenedRun:
    """Validate the configuration and choose the run directory.

    `existing`: the run directory of an earlier start of the same job.

    Raises:
        UsageError: the recipe, its data, the plan, the installed packages or the run directory do not allow the run.
    """
    problem = missing_dependency(config)
    if problem is not None:
        raise UsageError(problem)
    recipe = recipes.build_recipe(config.recipe)
    sizes = recipes.get_dataset_sizes(recipe)
    config = reuse_resolved_batch(config, existing or run_path(config, run_id, nodes), is_restart=existing is not None)
    plan = make_training_plan(config, sizes, world)
    if existing is not None:
        decision = ResumeDecision(
            checkpoint=named_checkpoint(config.resume), require_checkpoint=config.resume == "must"
        )
        return OpenedRun(
            with_directory(config, existing), recipe, sizes, plan, RunDirectory(existing), decision, is_restart=True
        )
    config, path, decision = resolve_directory(
        config, run_path(config, run_id, nodes), recipes.find_unlearned_defaults(recipe)
    )
    run_dir = RunDirectory(path)
    check_resumed_data(decision.checkpoint or find_newest_checkpoint(run_dir, config), sizes)
    done = run_dir.read_done()
    complete = done is not None and not decision.is_new_run and covers_request(done, config, plan)
    return OpenedRun(config, recipe, sizes, plan, run_dir, decision, done if complete else None)


def find_newest_checkpoint(run_dir: RunDirectory, config: RunConfig) -> Path | None:
    return latest_path(run_dir.resolve_checkpoints_dir(config.checkpoint.dir))


def check_resumed_data(checkpoint: Path | None, sizes: DatasetSizes) -> None:
    """Check the length of the data before anything is written; the workers do so with the checkpoint they load."""
    with suppress(CorruptCheckpointError):  # the workers fall back to an earlier checkpoint
        if checkpoint is not None:
            check_data_length(checkpoint, read_manifest(checkpoint), sizes.train)


def resolve_directory(
    config: RunConfig, path: Path, unlearned: Mapping[str, Any] = MappingProxyType({})
) -> tuple[RunConfig, Path, ResumeDecision]:
    """Decide between resuming in `path` and a new run; a new run gets a sibling directory if `path` is taken.

    `unlearned`: keys of recipe fields that do not alter what is learned, with their defaults; they may change.

    Raises:
        UsageError: a key that affects training was changed, or there is nothing to resume from.
    """
    config = reuse_resolved_batch(with_directory(config, path), path)
    old, new = read_config(path), flatten(from_yaml(to_yaml(config)))
    try:
        decision = decide_resume(config.resume, path, old, new, unlearned=unlearned)
    except UsageError:
        if config.resume != "auto" or not has_nothing_to_resume(path):
            raise
        decision = ResumeDecision(starts_over=True)
    if decision.is_new_run and RunDirectory(path).run_yaml.exists():
        path = next_free_path(path)
        config = with_directory(config, path)
    return config, path, decision


def has_nothing_to_resume(path: Path) -> bool:
    """Whether the run in `path` ended before its first checkpoint, so that it does not hold its name."""
    run_dir, old = RunDirectory(path), read_config(path)
    if old is None or run_dir.done_json.exists() or find_lock_owner(path) is not None:
        return False
    checkpoints = run_dir.resolve_checkpoints_dir(old.get("checkpoint.dir"))
    names = [entry.name for entry in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return all(name.startswith((".", "tmp")) for name in names)  # those are still being written


def reuse_resolved_batch(config: RunConfig, path: Path, *, is_restart: bool = False) -> RunConfig:
    """Replace batch.per_device=auto by the value that the run in `path` resolved it to, if there is one.

    A run without a checkpoint may have had another model; only a restart of the same job (`is_restart`) has not.
    """
    if config.batch.per_device != "auto" or config.resume == "never":
        return config
    if not is_restart and has_nothing_to_resume(path):
        return config
    size = (read_config(path) or {}).get("batch.per_device")
    return replace(config, batch=replace(config.batch, per_device=size)) if isinstance(size, int) else config


def named_checkpoint(resume: str) -> Path | None:
    """Return the checkpoint that `resume` names, for a restarted job; None for auto, must and never."""
    return None if resume in ("auto", "must", "never") else resolve_checkpoint_path(resume)


def covers_request(done: Mapping[str, Any], config: RunConfig, plan: TrainingPlan) -> bool:
    """Whether the finished training covers the request: its duration, or the target if training stops there."""
    return plan.duration <= done["samples"] or ("target" in done and config.train.stop_at_target)


def write_run_files(opened: OpenedRun, profile: Mapping[str, Any] | None = None) -> None:
    """Write run.yaml and clear the stop request of an earlier job. The caller holds the lock.

    Its done.json is cleared by the workers, once all their checks have passed.

    `profile`: the measured update times that batch=goodput uses.
    """
    if opened.decision.starts_over:
        opened.run_dir.set_aside_records()
        print_stderr(
            f"note: {opened.run_dir.path} ended before its first checkpoint and had another configuration: this run "
            f"replaces it, and the old records are in {opened.run_dir.logs}"
        )
    atomic_write_text(opened.run_dir.run_yaml, to_yaml(opened.config))
    if profile is not None:
        atomic_write_text(opened.run_dir.profile_json, json.dumps(profile) + "\n")
    if not opened.is_restart:
        opened.run_dir.clear_stop()


def run_path(config: RunConfig, run_id: str | None, nodes: int, job: str | None = None) -> Path:
    """Return the requested run directory.

    Without a name of its own the run is named after what finds it again when it is requeued: its id in W&B, else the
    Slurm job: `job`, default that of the batch script.
    """
    if config.run.dir is not None:
        return Path(config.run.dir)
    if config.run.name is not None:
        return RUNS_DIR / config.run.name
    job = get_wandb_run_id() or job or get_batch_job_id()
    if job is None and nodes > 1:
        job = get_slurm_step_id() or run_id
        if job is None:
            raise UsageError(
                f"run.name is not set, and its default, the start time, differs between {nodes} nodes: type run.name=…"
            )
    return RUNS_DIR / unique_run_name(format_recipe_name(str(config.recipe["_target_"])), job, datetime.now())


def with_directory(config: RunConfig, path: Path) -> RunConfig:
    return replace(config, run=replace(config.run, name=config.run.name or path.name, dir=str(path)))


def read_config(path: Path) -> Mapping[str, Any] | None:
    """Read the flat configuration of the run in `path`; None if there is no run.

    Raises:
        UsageError: it cannot be read, or a link leads out of the run directory.
    """
    refuse_outward_links(path)
    run_yaml = RunDirectory(path).run_yaml
    try:
        return flatten(from_yaml(run_yaml.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, UsageError) as problem:
        raise UsageError(f"{run_yaml} cannot be read ({problem}): type another run.name=") from problem


def next_free_path(path: Path) -> Path:
    return next(p for i in range(2, 10_000) if not (p := path.with_name(f"{path.name}-{i}")).exists())
