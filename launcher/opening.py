"""Before anything is created: which folder a run has, and what an existing one means for it."""

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
    """A run that may start: checked at its world size, its folder and name decided, nothing created yet.

    `done`: what done.json holds where the run is complete already. `knows`: an earlier start of the job began it.
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
        """What to say where nothing is left to do."""
        done = self.done or {}
        figures = "".join(f", {name} {value:.4g}" for name, value in sorted(done.get("metrics", {}).items()))
        return (
            f"{self.folder.path} is complete: {done['samples']} samples in {done['updates']} updates, "
            f"{done['seconds']:.1f} s{figures}\n"
            f"a longer train.duration goes on from there; resume=never starts a new run beside it"
        )


def opened(run: Run, world: int, *, known: Path | None = None, run_id: str | None = None, nodes: int = 1) -> Opened:
    """Check the run and decide on its folder. `known`: the folder of an earlier start of the same job.

    Raises:
        RequestError: the recipe, its data, the plan, what is installed or the folder do not allow it.
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
    """The run in its folder, which is another one beside `path` where that holds a run and a new one is asked for.

    Raises:
        RequestError: a key that alters what is learned was changed, or there is nothing to resume from.
    """
    run = kept(placed(run, path), path)
    decision = decide(run.resume, path, configuration(path), flat(from_yaml(to_yaml(run))))
    if decision.fresh and (path / "run.yaml").exists():
        path = beside(path)
        run = placed(run, path)
    return run, path, decision


def kept(run: Run, path: Path) -> Run:
    """Where batch.per_device=auto was answered when the run in `path` began, with that number."""
    if run.batch.per_device != "auto" or run.resume == "never":
        return run
    size = (configuration(path) or {}).get("batch.per_device")
    return replace(run, batch=replace(run.batch, per_device=size)) if isinstance(size, int) else run


def asked_for(resume: str) -> Path | None:
    """The checkpoint that `resume` names, at a restart: nobody else may decide then."""
    return None if resume in ("auto", "must", "never") else named(resume)


def is_enough(done: Mapping[str, Any], run: Run, plan: Study) -> bool:
    """Whether what was done is all that is asked for: the duration, or the target where training stops at it."""
    return plan.duration <= done["samples"] or ("target" in done and run.train.stop_at_target)


def begin(found: Opened, profile: Mapping[str, Any] | None = None) -> None:
    """Write down in the folder, which is ours, what was asked for; a stop that an earlier job was asked for is over.

    `profile`: what batch=goodput chooses by.
    """
    write_whole(found.folder.run_yaml, to_yaml(found.run))
    if profile is not None:
        write_whole(found.folder.profile_json, json.dumps(profile) + "\n")
    if not found.knows:
        found.folder.clear_stop()
        found.folder.done_json.unlink(missing_ok=True)  # more is asked for than was done: it is not complete


def path_of(run: Run, run_id: str | None, nodes: int, job: str | None = None) -> Path:
    """The folder that is asked for; `job`: the Slurm job that it is for, where that is not this process's own."""
    if run.run.dir is not None:
        return Path(run.run.dir)
    if run.run.name is not None:
        return RUNS / run.run.name
    job = job or slurm_job()
    if job is None and nodes > 1:
        if run_id is None:
            raise RequestError(f"run.name is not given and {nodes} nodes cannot agree on the time: type run.name=…")
        job = run_id
    return RUNS / free_name(recipe_name(str(run.recipe["_target_"])), job, datetime.now())


def placed(run: Run, path: Path) -> Run:
    return replace(run, run=replace(run.run, name=run.run.name or path.name, dir=str(path)))


def configuration(path: Path) -> Mapping[str, Any] | None:
    """The folder's own configuration, flat; None where it holds no run."""
    try:
        return flat(from_yaml((path / "run.yaml").read_text()))
    except FileNotFoundError:
        return None
    except (OSError, RequestError) as problem:
        raise RequestError(f"{path / 'run.yaml'} cannot be read ({problem}): type another run.name=") from problem


def beside(path: Path) -> Path:
    return next(p for i in range(2, 10_000) if not (p := path.with_name(f"{path.name}-{i}")).exists())
