"""Sweeps: sequential through Hydra, in parallel on this machine, or with points chosen by Optuna."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import search as searching
from launcher import sweep, tally
from launcher.abreast import Crew, Job
from launcher.arguments import Arguments
from launcher.config import Asked, Composed, Composer
from launcher.durable import private_folder
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, RequestError
from launcher.lanes import Machine, lanes
from launcher.points import Point, Task, of_a_point, run_placed, say, swept
from launcher.redact import redact
from launcher.resume import is_free
from launcher.search import Axis, Search
from launcher.settings import Run, SweepSettings

__all__ = ["multirun"]


def multirun(args: Sequence[str], point: Point) -> int:
    """Run `point` for each point of the sweep and print the results table; returns the highest exit status.

    All points of a plain sweep are composed and checked before the first starts. `point` must be a module-level
    function, since a Hydra launcher plugin may call it in another process. A failed point does not end the sweep.

    Raises:
        RequestError: the configuration of a point is wrong; nothing was created.
    """
    arguments = Arguments.parse(args)
    composer = Composer(arguments.config_dirs)
    asked = composer.asked(arguments.overrides)
    flags = [word for one in arguments.config_dirs for word in ("--config-dir", one)]
    task = Task(point, tuple(flags), arguments.share)
    folder = sweep.folder_of(asked.settings.run)
    settings = asked.settings.sweep
    refuse_elsewhere(settings, asked, task)
    if settings.trials is not None:
        outcomes = searched(composer, task, folder, asked)
    else:
        points = composer.points(asked.config)
        composed = [composer.composed(overrides) for overrides in points]
        if settings.at_once > 1 and points:
            outcomes = side_by_side(task, folder, points, composed, settings.at_once)
        else:
            outcomes = swept(composer, task, folder, asked.own)
    print(tally.table(folder, outcomes))
    return sweep.worst(outcomes)


def refuse_elsewhere(settings: SweepSettings, asked: Asked, task: Task) -> None:
    """Refuse parallel and Optuna sweeps elsewhere: they run on the local machine only."""
    given = f"sweep.trials={settings.trials}" if settings.trials else f"sweep.at_once={settings.at_once}"
    if settings.trials is None and settings.at_once == 1:
        return
    if not asked.here or asked.config.launch.kind == "slurm":
        other = "launch=slurm" if asked.here else "hydra/launcher="
        raise RequestError(f"{given} runs points on this machine only: leave it out, or {other}")
    if settings.trials is not None and task.share[1] > 1:
        raise RequestError(f"{given}: each point depends on all earlier ones: leave --share out")


# --- parallel sweeps ----------------------------------------------------------------------------------------------


def side_by_side(
    task: Task, folder: Path, points: Sequence[Sequence[str]], composed: Sequence[Composed], at_once: int
) -> list[sweep.Outcome]:
    """Run this process's share of the points, `at_once` at a time, each in its own process and machine slice."""
    ours = [number for number in range(len(points)) if task.has(number)]
    parts = lanes(max(1, min(at_once, len(ours))), [composed[number].run for number in ours], Machine.here())
    say(f"running {len(parts)} points in parallel, each on {parts[-1]}")
    crew, progress = Crew(parts, say), Progress(folder)
    jobs = (
        progress.job(task, number, points[number], functools.partial(composed.__getitem__, number)) for number in ours
    )
    crew.run(jobs, progress.ended)
    progress.raise_interrupted()
    return [progress.outcome(number, overrides) for number, overrides in enumerate(points)]


class Progress:
    """Exit statuses of the points so far; prints a line as each point ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._statuses: dict[int, int] = {}

    def job(self, task: Task, number: int, overrides: Sequence[str], compose: Callable[[], Composed]) -> Job:
        run = functools.partial(point_in, self._folder, task, number, overrides, compose)
        return Job(number, run, self._folder / f"{number}.log")

    def ended(self, job: Job, status: int) -> None:
        self._statuses[job.number] = status
        figures = tally.point_figures(self._folder / str(job.number))
        facts = [f"{figures.seconds:.1f} s"] if figures.seconds else []
        facts += [f"{figures.metric} {figures.best:.4g}"] if figures.metric else []
        facts += [last_error(job.log)] if status else []
        say(f"point {job.number} {', '.join([self.outcome(job.number, ()).ended, *facts])} (log: {job.log})")

    def outcome(self, number: int, overrides: Sequence[str]) -> sweep.Outcome:
        status, words = self._statuses.get(number), tuple(of_a_point(overrides))
        if status is None:
            return sweep.Outcome(number, words, EXIT_OK, sweep.NOT_OURS)
        done = (self._folder / str(number) / "done.json").exists()
        return sweep.Outcome(
            number, words, status, f"failed ({status})" if status else sweep.FINISHED if done else sweep.STOPPED
        )

    def raise_interrupted(self) -> None:
        """After a second Ctrl-C end the sweep without a table, as in sequential sweeps."""
        if EXIT_INTERRUPTED in self._statuses.values():
            raise KeyboardInterrupt


def point_in(folder: Path, task: Task, number: int, overrides: Sequence[str], compose: Callable[[], Composed]) -> int:
    """Run one point in its own process."""
    say(f"point {number}: {' '.join(of_a_point(overrides))}")
    return run_placed(task, folder, str(number), compose, overrides)[1]


def last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    return lines[-1] if lines else "the process was killed"


# --- Optuna sweeps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """Metric to optimise; `most`: maximise it, else minimise."""

    metric: str
    most: bool

    @classmethod
    def of(cls, settings: SweepSettings, run: Run) -> Goal:
        metric = settings.metric or run.train.target.metric
        if metric is None:
            raise RequestError(f"sweep.trials={settings.trials} needs a metric: type e.g. sweep.metric=val/accuracy")
        most = not tally.lower_is_better(metric) if settings.mode == "auto" else settings.mode == "max"
        return cls(metric, most)


def searched(composer: Composer, task: Task, folder: Path, asked: Asked) -> list[sweep.Outcome]:
    """Run up to sweep.trials points, including those of earlier commands. Failed points count as trials."""
    settings = asked.settings.sweep
    trials = settings.trials or 1
    if (lack := searching.missing(trials)) is not None:
        raise RequestError(lack)
    fixed, axes = composer.axes(asked.config)
    runs = [composer.composed([*fixed, *words]).run for words in corners(axes)]
    parts, goal = lanes(min(settings.at_once, trials), runs, Machine.here()), Goal.of(settings, runs[0])
    private_folder(folder)
    found = Search(folder, axes, question(fixed, axes, goal), most=goal.most, seed=runs[0].seed)
    progress, crew = Progress(folder), Crew(parts, say)
    jobs = (
        progress.job(task, number, words, functools.partial(composer.composed, words))
        for number, own in found.points(trials)
        for words in [[*fixed, *own]]
    )
    crew.run(jobs, functools.partial(learn, progress, folder, found, goal))
    progress.raise_interrupted()
    say_best(found, goal)
    return [
        sweep.Outcome(number, tuple(of_a_point([*fixed, *own])), EXIT_FAILED * (word == "failed"), word)
        for number, own, word in found.so_far()
    ]


def corners(axes: Sequence[Axis]) -> Iterator[list[str]]:
    """Points that cover both ends of each axis (the other axes at their first value), to check every value up front."""
    if not axes:
        raise RequestError("sweep.trials: no key is searched over: type e.g. lr.base='tag(log,interval(0.01,1))'")
    first = [axis.extremes()[0] for axis in axes]
    for at, axis in enumerate(axes):
        for word in axis.extremes():
            yield [*first[:at], word, *first[at + 1 :]]


def question(fixed: Sequence[str], axes: Sequence[Axis], goal: Goal) -> dict[str, str]:
    """Fingerprint of the search; a change means that it is a different search."""
    asked = {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in of_a_point(fixed))}
    asked = {key: redact(value) for key, value in asked.items() if not is_free(key)}
    return {**asked, **{axis.name: repr(axis) for axis in axes}, "sweep.metric": goal.metric}


def learn(progress: Progress, folder: Path, found: Search, goal: Goal, job: Job, status: int) -> None:
    """Report a finished point to Optuna; a stopped point is skipped, since the same command continues it."""
    progress.ended(job, status)
    point = folder / str(job.number)
    if status == EXIT_INTERRUPTED or (status == EXIT_OK and not (point / "done.json").exists()):
        return
    value = tally.value_of(point, goal.metric, goal.most)
    if value is None and status == EXIT_OK:
        say(f"point {job.number} reported no {goal.metric}; it is excluded from the search")
    found.tell(job.number, value)


def say_best(found: Search, goal: Goal) -> None:
    best, so_far = found.best(), found.so_far()
    if best is not None:
        number, value = best
        say(f"best of {len(so_far)} points: point {number}, {goal.metric} {value:.4g}: {' '.join(so_far[number][1])}")
