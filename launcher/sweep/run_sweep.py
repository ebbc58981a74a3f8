"""Sweeps: sequential through Hydra, in parallel on this machine, or with points chosen by Optuna."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.analysis.point_metrics import is_lower_better, read_objective, read_point_metrics
from launcher.config.cli_args import HydraArgs
from launcher.config.compose import ComposedConfig, ConfigComposer, SweepRequest
from launcher.config.resume_keys import may_change_on_resume
from launcher.config.schema import RunConfig, SweepConfig
from launcher.config.search_space import SearchAxis
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, UsageError
from launcher.recipe import build_recipe, find_unlearned_defaults
from launcher.run_dir.run_directory import RunDirectory
from launcher.sweep import outcome
from launcher.sweep.machine_slices import MachineResources, divide_machine
from launcher.sweep.optuna_search import OptunaSearch, check_optuna
from launcher.sweep.parallel_points import ParallelRunner, PointJob
from launcher.sweep.points import PointFunction, PointTask, run_in_directory, run_points, select_point_overrides
from launcher.sweep.results_table import format_sweep_table
from launcher.sweep.run_dirs import check_search_name, choose_directories
from launcher.system.atomic_files import make_durable_dir
from launcher.system.formatting import format_plural
from launcher.system.redaction import mask_secrets
from launcher.system.stderr import print_stderr

__all__ = ["run_sweep"]


def run_sweep(args: Sequence[str], point: PointFunction) -> int:
    """Run `point` for each point of the sweep and print the results table; returns the highest exit status.

    All points of a plain sweep are composed and checked before the first starts. `point` must be a module-level
    function, since a Hydra launcher plugin may call it in another process. A failed point does not end the sweep.

    Raises:
        UsageError: the configuration of a point is wrong; nothing was created.
    """
    arguments = HydraArgs.parse(args)
    composer = ConfigComposer(arguments.config_dirs)
    request = composer.read_sweep_request(arguments.overrides)
    outcome.refuse_shared_wandb_run(request.config.get("sink") or ())
    flags = [word for folder in arguments.config_dirs for word in ("--config-dir", folder)]
    task = PointTask(point, tuple(flags), arguments.shard)
    settings = request.settings.sweep
    require_local(settings, request, task)
    if settings.trials is not None:
        return run_search(composer, task, request)
    points = composer.expand_points(request.config)
    composed = [composer.compose_single(overrides) for overrides in points]
    directories = choose_directories(request, points, composed)
    folder, task = directories.folder, replace(task, own=directories.own)
    if is_dry_run(request, composed):
        return show_points(task, folder, points, composed)
    if settings.max_parallel > 1 and points:
        outcomes = run_in_parallel(task, folder, points, composed, settings.max_parallel)
    else:
        outcomes = run_points(composer, task, folder, request.overrides)
    print(format_sweep_table(folder, outcomes))
    return outcome.find_worst_status(outcomes)


def is_dry_run(request: SweepRequest, composed: Sequence[ComposedConfig]) -> bool:
    """Whether the points are only shown.

    Raises:
        UsageError: only some of them are, or another sweeper chooses them.
    """
    dry = {point.config.launch.dry_run for point in composed} or {bool(request.config.launch.dry_run)}
    if len(dry) > 1:
        raise UsageError("launch.dry_run can't be swept over: type one value")
    if dry == {True} and not composed:
        raise UsageError("launch.dry_run=true cannot show the points of hydra/sweeper=, which chooses them as they run")
    return dry == {True}


def show_points(
    task: PointTask, folder: Path, points: Sequence[Sequence[str]], composed: Sequence[ComposedConfig]
) -> int:
    """Show what every point of this process's shard would start; returns the highest exit status."""
    status, shown = EXIT_OK, 0
    for number, overrides in enumerate(points):
        if task.is_in_shard(number):
            words = [word for word in select_point_overrides(overrides) if not word.startswith("launch.dry_run=")]
            run_dir = task.get_own_dir(number) or folder / str(number)
            print(mask_secrets(f"# point {number}, {run_dir}: {' '.join(' '.join(words).split())}"), flush=True)
            compose = functools.partial(composed.__getitem__, number)
            status = max(status, run_in_directory(task, folder, str(number), compose, overrides)[1])
            shown += 1
    print_stderr(f"{format_plural(shown, 'point')} shown, nothing was started")
    return status


def require_local(settings: SweepConfig, request: SweepRequest, task: PointTask) -> None:
    """Refuse parallel and Optuna sweeps elsewhere: they run on the local machine only."""
    option = f"sweep.trials={settings.trials}" if settings.trials else f"sweep.max_parallel={settings.max_parallel}"
    if settings.trials is None and settings.max_parallel == 1:
        return
    if not request.is_local or request.config.launch.kind == "slurm":
        other = "launch=slurm" if request.is_local else "hydra/launcher="
        raise UsageError(f"{option} runs points on this machine only: leave it out, or {other}")
    if settings.trials is not None and task.shard[1] > 1:
        raise UsageError(f"{option}: each point depends on all earlier ones: leave --shard out")


# --- parallel sweeps ----------------------------------------------------------------------------------------------


def run_in_parallel(
    task: PointTask,
    folder: Path,
    points: Sequence[Sequence[str]],
    composed: Sequence[ComposedConfig],
    max_parallel: int,
) -> list[outcome.PointOutcome]:
    """Run this process's shard of the points, `max_parallel` at a time, each in its own process and machine slice."""
    numbers = [number for number in range(len(points)) if task.is_in_shard(number)]
    slices = divide_machine(
        max(1, min(max_parallel, len(numbers))),
        [composed[number].config for number in numbers],
        MachineResources.from_environment(),
    )
    print_stderr(f"running {len(slices)} points in parallel, each on {slices[-1]}")
    runner, progress = ParallelRunner(slices, print_stderr), SweepProgress(folder, task)
    jobs = (
        progress.make_job(number, points[number], functools.partial(composed.__getitem__, number)) for number in numbers
    )
    runner.run(jobs, progress.record_exit)
    progress.raise_interrupted()
    return [progress.make_outcome(number, overrides) for number, overrides in enumerate(points)]


class SweepProgress:
    """Exit statuses of the points so far; prints a line as each point ends."""

    def __init__(self, folder: Path, task: PointTask) -> None:
        self._folder = folder
        self._task = task
        self._statuses: dict[int, int] = {}

    def make_job(self, number: int, overrides: Sequence[str], compose: Callable[[], ComposedConfig]) -> PointJob:
        run = functools.partial(run_point_in_process, self._folder, self._task, number, overrides, compose)
        return PointJob(number, run, self._folder / f"{number}.log")

    def record_exit(self, job: PointJob, status: int) -> None:
        self._statuses[job.number] = status
        ended = self.make_outcome(job.number, ())
        metrics = read_point_metrics(ended.get_path(self._folder))
        facts = [ended.ended]
        facts += [f"{metrics.seconds:.1f} s"] if metrics.seconds else []
        facts += [f"{metrics.metric} {metrics.best:.4g}"] if metrics.metric else []
        facts += [find_last_error(job.log)] if status else []
        print_stderr(f"point {job.number} {', '.join(facts)} (log: {job.log})")

    def make_outcome(self, number: int, overrides: Sequence[str]) -> outcome.PointOutcome:
        status, own_overrides = self._statuses.get(number), tuple(select_point_overrides(overrides))
        point = outcome.PointOutcome(
            number, own_overrides, status or EXIT_OK, outcome.NOT_RUN, self._task.get_own_dir(number)
        )
        if status is None:
            return point
        is_done = RunDirectory(point.get_path(self._folder)).done_json.exists()
        return replace(
            point, ended=f"failed ({status})" if status else outcome.FINISHED if is_done else outcome.STOPPED
        )

    def raise_interrupted(self) -> None:
        """After a second Ctrl-C end the sweep without a table, as in sequential sweeps."""
        if EXIT_INTERRUPTED in self._statuses.values():
            raise KeyboardInterrupt


def run_point_in_process(
    folder: Path, task: PointTask, number: int, overrides: Sequence[str], compose: Callable[[], ComposedConfig]
) -> int:
    """Run one point in its own process."""
    print_stderr(f"point {number}: {' '.join(select_point_overrides(overrides))}")
    return run_in_directory(task, folder, str(number), compose, overrides)[1]


def find_last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    return lines[-1] if lines else "the process was killed"


# --- Optuna sweeps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """Metric to optimise; `maximize`: whether a higher value is better."""

    metric: str
    maximize: bool

    @classmethod
    def from_settings(cls, settings: SweepConfig, config: RunConfig) -> Objective:
        metric = settings.metric or config.train.target.metric
        if metric is None:
            raise UsageError(f"sweep.trials={settings.trials} needs a metric: type e.g. sweep.metric=val/accuracy")
        maximize = not is_lower_better(metric) if settings.mode == "auto" else settings.mode == "max"
        return cls(metric, maximize)


def run_search(composer: ConfigComposer, task: PointTask, request: SweepRequest) -> int:
    """Run up to sweep.trials points, including those of earlier commands, and print the results table.

    Failed points count as trials. Returns the highest exit status.
    """
    settings = request.settings.sweep
    trials = settings.trials or 1
    if (problem := check_optuna(trials)) is not None:
        raise UsageError(problem)
    if request.config.launch.dry_run:
        raise UsageError(
            f"launch.dry_run=true cannot show the points of sweep.trials={settings.trials}, which are chosen from the "
            "results of earlier ones: remove one of them"
        )
    fixed, axes = composer.split_axes(request.config)
    configs = [composer.compose_single([*fixed, *overrides]).config for overrides in iter_boundary_points(axes)]
    slices = divide_machine(min(settings.max_parallel, trials), configs, MachineResources.from_environment())
    objective = Objective.from_settings(settings, configs[0])
    folder = outcome.choose_sweep_directory(check_search_name(request, configs))
    make_durable_dir(folder)
    unlearned = find_unlearned_defaults(build_recipe(configs[0].recipe))
    fingerprint = make_search_fingerprint(fixed, axes, objective, unlearned)
    search = OptunaSearch(folder, axes, fingerprint, maximize=objective.maximize, seed=configs[0].seed)
    progress, runner = SweepProgress(folder, task), ParallelRunner(slices, print_stderr)
    jobs = (
        progress.make_job(number, overrides, functools.partial(composer.compose_single, overrides))
        for number, chosen in search.iter_points(trials)
        for overrides in [[*fixed, *chosen]]
    )
    runner.run(jobs, functools.partial(record_point, progress, folder, search, objective))
    progress.raise_interrupted()
    print_best_point(search, objective)
    outcomes = [
        outcome.PointOutcome(
            number, tuple(select_point_overrides([*fixed, *chosen])), EXIT_FAILED * (ended == "failed"), ended
        )
        for number, chosen, ended in search.list_results()
    ]
    print(format_sweep_table(folder, outcomes))
    return outcome.find_worst_status(outcomes)


def iter_boundary_points(axes: Sequence[SearchAxis]) -> Iterator[list[str]]:
    """Points that cover both ends of each axis (the other axes at their first value), to check every value up front."""
    if not axes:
        raise UsageError("sweep.trials: no key is searched over: type e.g. lr.base='tag(log,interval(0.01,1))'")
    first = [axis.list_extremes()[0] for axis in axes]
    for index, axis in enumerate(axes):
        for override in axis.list_extremes():
            yield [*first[:index], override, *first[index + 1 :]]


def make_search_fingerprint(
    fixed: Sequence[str], axes: Sequence[SearchAxis], objective: Objective, unlearned: Collection[str] = ()
) -> dict[str, str]:
    """Fingerprint of the search; a change means that it is a different search.

    `unlearned`: keys of recipe fields that do not alter what is learned.
    """
    typed = {
        key.lstrip("+"): value for key, _, value in (word.partition("=") for word in select_point_overrides(fixed))
    }
    values = {
        key: mask_secrets(value)
        for key, value in typed.items()
        if not may_change_on_resume(key) and key not in unlearned
    }
    return {**values, **{axis.name: repr(axis) for axis in axes}, "sweep.metric": objective.metric}


def record_point(
    progress: SweepProgress, folder: Path, search: OptunaSearch, objective: Objective, job: PointJob, status: int
) -> None:
    """Report a finished point to Optuna; a stopped point is skipped, since the same command continues it."""
    progress.record_exit(job, status)
    point = folder / str(job.number)
    if status == EXIT_INTERRUPTED or (status == EXIT_OK and not RunDirectory(point).done_json.exists()):
        return
    value = read_objective(point, objective.metric, objective.maximize)
    if value is None and status == EXIT_OK:
        print_stderr(f"point {job.number} reported no {objective.metric}; it is excluded from the search")
    search.report_value(job.number, value)


def print_best_point(search: OptunaSearch, objective: Objective) -> None:
    best, results = search.find_best(), search.list_results()
    if best is not None:
        number, value = best
        overrides = " ".join(results[number][1])
        print_stderr(f"best of {len(results)} points: point {number}, {objective.metric} {value:.4g}: {overrides}")
