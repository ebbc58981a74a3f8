"""Choose the run directory and decide whether to resume in it, before anything is created."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher import recipe as recipes
from launcher.config import flat, from_yaml, to_yaml
from launcher.errors import RequestError
from launcher.manifest import named
from launcher.resume import Decision, decide
from launcher.runfolder import RUNS, RunFolder, free_name, recipe_name, write_whole
from launcher.settings import Run
from launcher.strategies import missing
from launcher.study import Sizes, Study, study
from launcher.topology import slurm_job

__all__ = ["Opened", "begin", "decided", "kept", "opened", "path_of"]


@dataclass(frozen=True)
class Opened:
    """A validated run that is ready to start: directory and name are decided, nothing is created yet.

    `done`: content of done.json if the run is already complete. `knows`: an earlier start of the same job began it.
    """

    run: Run
    recipe: Any
    sizes: Sizes
    study: Study
    folder: RunFolder
    decision: Decision
    done: Mapping[str, Any] | None = None
    knows: bool = False

    @property
    def complete(self) -> bool:
        return self.done is not None

    def summary(self) -> str:
        """Message for a run that is already complete."""
        done = self.done or {}
        figures = "".join(f", {name} {value:.4g}" for name, value in sorted(done.get("metrics", {}).items()))
        return (
            f"{self.folder.path} is complete: {done['samples']} samples in {done['updates']} updates, "
            f"{done['seconds']:.1f} s{figures}\n"
            f"increase train.duration to continue, or type resume=never for a new run in another directory"
        )


def opened(run: Run, world: int, *, known: Path | None = None, run_id: str | None = None, nodes: int = 1) -> Opened:
    """Validate the configuration and choose the run directory.

    `known`: the run directory of an earlier start of the same job.

    Raises:
        UsageError: the recipe, its data, the plan, the installed packages or the run directory do not allow the run.
    """
    lacking = missing(run)
    if lacking is not None:
        raise RequestError(lacking)
    recipe = recipes.build(run.recipe)
    sizes = recipes.sizes(recipe)
    run = kept(run, known or path_of(run, run_id, nodes))
    plan = study(run, sizes, world)
    if known is not None:
        asked = Decision(checkpoint=asked_for(run.resume), must=run.resume == "must")
        return Opened(placed(run, known), recipe, sizes, plan, RunFolder(known), asked, knows=True)
    run, path, decision = decided(run, path_of(run, run_id, nodes))
    folder = RunFolder(path)
    done = folder.read_done()
    complete = done is not None and not decision.fresh and is_enough(done, run, plan)
    return Opened(run, recipe, sizes, plan, folder, decision, done if complete else None)


def decided(run: Run, path: Path) -> tuple[Run, Path, Decision]:
    """Decide between resuming in `path` and a new run; a new run gets a sibling directory if `path` is taken.

    Raises:
        UsageError: a key that affects training was changed, or there is nothing to resume from.
    """
    run = kept(placed(run, path), path)
    decision = decide(run.resume, path, configuration(path), flat(from_yaml(to_yaml(run))))
    if decision.fresh and (path / "run.yaml").exists():
        path = beside(path)
        run = placed(run, path)
    return run, path, decision


def kept(run: Run, path: Path) -> Run:
    """Replace batch.per_device=auto by the value that the run in `path` resolved it to, if there is one."""
    if run.batch.per_device != "auto" or run.resume == "never":
        return run
    size = (configuration(path) or {}).get("batch.per_device")
    return replace(run, batch=replace(run.batch, per_device=size)) if isinstance(size, int) else run


def asked_for(resume: str) -> Path | None:
    """Return the checkpoint that `resume` names, for a restarted job; None for auto, must and never."""
    return None if resume in ("auto", "must", "never") else named(resume)


def is_enough(done: Mapping[str, Any], run: Run, plan: Study) -> bool:
    """Whether the finished training covers the request: its duration, or the target if training stops there."""
    return plan.duration <= done["samples"] or ("target" in done and run.train.stop_at_target)


def begin(found: Opened, profile: Mapping[str, Any] | None = None) -> None:
    """Write run.yaml and clear the stop request and done.json of an earlier job. The caller holds the lock.

    `profile`: the measured update times that batch=goodput uses.
    """
    write_whole(found.folder.run_yaml, to_yaml(found.run))
    if profile is not None:
        write_whole(found.folder.profile_json, json.dumps(profile) + "\n")
    if not found.knows:
        found.folder.clear_stop()
        found.folder.done_json.unlink(missing_ok=True)  # more training is requested: not complete any more


def path_of(run: Run, run_id: str | None, nodes: int, job: str | None = None) -> Path:
    """Return the requested run directory. `job`: the Slurm job to name it after, default the current one."""
    if run.run.dir is not None:
        return Path(run.run.dir)
    if run.run.name is not None:
        return RUNS / run.run.name
    job = job or slurm_job()
    if job is None and nodes > 1:
        if run_id is None:
            raise RequestError(f"run.name is not set and {nodes} nodes cannot agree on a time: type run.name=…")
        job = run_id
    return RUNS / free_name(recipe_name(str(run.recipe["_target_"])), job, datetime.now())


def placed(run: Run, path: Path) -> Run:
    return replace(run, run=replace(run.run, name=run.run.name or path.name, dir=str(path)))


def configuration(path: Path) -> Mapping[str, Any] | None:
    """Read the flat configuration of the run in `path`; None if there is no run."""
    try:
        return flat(from_yaml((path / "run.yaml").read_text()))
    except FileNotFoundError:
        return None
    except (OSError, RequestError) as problem:
        raise RequestError(f"{path / 'run.yaml'} cannot be read ({problem}): type another run.name=") from problem


def beside(path: Path) -> Path:
    return next(p for i in range(2, 10_000) if not (p := path.with_name(f"{path.name}-{i}")).exists())
