"""Sequential sweeps through Hydra's sweeper and launcher, and running a single point."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from launcher import sweep
from launcher.config import PLACES, PRIMARY, Composed, Composer, one_line, opened, parse, plain, settled
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_REQUEST, RequestError
from launcher.redact import redact
from launcher.settings import Run

__all__ = ["Point", "Task", "of_a_point", "quoted", "run_placed", "run_point", "say", "swept"]

#: Runs one point of a sweep, given its configuration and the equivalent command-line arguments.
Point = Callable[[Run, Sequence[str]], int]


@dataclass(frozen=True)
class Task:
    """How to run each point. `flags` precede its overrides; `share` (k, n): run every n-th point starting at k."""

    point: Point
    flags: tuple[str, ...] = ()
    share: tuple[int, int] = (0, 1)

    def has(self, number: int) -> bool:
        return number % self.share[1] == self.share[0] % self.share[1]


def swept(composer: Composer, task: Task, folder: Path, overrides: Sequence[str]) -> list[sweep.Outcome]:
    """Run every point through Hydra's sweeper and launcher, or the plugins selected by the user."""
    from hydra._internal.hydra import Hydra

    here: list[sweep.Outcome] = []
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2(PRIMARY, composer.search_path)
    place = f"hydra.sweep.dir={quoted(folder)}"
    try:
        with one_line():
            job = functools.partial(run_point, task, here)
            returned = hydra.multirun(PRIMARY, job, [*opened(overrides), place], with_log_configuration=False)
    finally:
        GlobalHydra.instance().clear()
        sweep.seal(folder / "multirun.yaml")
    return _outcomes(returned) or here


def _outcomes(returned: Any) -> list[sweep.Outcome]:
    """Outcomes returned by the jobs, also from other processes; custom sweepers may return nothing."""
    batches = returned if isinstance(returned, list) else []
    jobs = [job for batch in batches if isinstance(batch, list | tuple) for job in batch]
    return [job.return_value for job in jobs if isinstance(job.return_value, sweep.Outcome)]


def run_point(task: Task, here: list[sweep.Outcome], config: DictConfig) -> sweep.Outcome:
    """Hydra's task function: run one point. A failure is printed and returned, so that the next point still runs.

    After a stopped point no further point is started.
    """
    hydra = HydraConfig.get()
    folder, number = Path(hydra.sweep.dir), str(hydra.sweep.subdir)
    overrides = [str(override) for override in hydra.overrides.task]
    sweep.seal(folder / "multirun.yaml")
    job = int(hydra.job.num)
    if not task.has(job) or any(outcome.stopped for outcome in here):
        here.append(sweep.Outcome(job, tuple(overrides), EXIT_OK, sweep.NOT_OURS))
        return here[-1]
    say(f"point {number}: {' '.join(overrides)}")
    ended, status = run_placed(task, folder, number, lambda: settled(plain(config), parse(overrides)), overrides)
    if status == EXIT_INTERRUPTED:
        raise KeyboardInterrupt  # ends the sweep
    here.append(sweep.Outcome(job, tuple(overrides), status, ended))
    return here[-1]


def run_placed(
    task: Task, folder: Path, number: str, compose: Callable[[], Composed], overrides: Sequence[str]
) -> tuple[str, int]:
    """Run one point in its own run directory; returns the outcome word and the exit status."""
    try:
        composed = compose()
        for note in composed.notes:
            say(f"note: {note}")
        placed = sweep.placed(composed.run, folder, number)
        words = [*task.flags, *of_a_point(overrides), f"run.dir={quoted(placed.run.dir)}", *grouped(placed)]
        status = task.point(placed, words)
        return sweep.ended(placed, status), status
    except RequestError as error:
        say(f"error: {error}")
        return f"failed ({EXIT_REQUEST})", EXIT_REQUEST
    except Exception as error:
        say(f"error: {type(error).__name__}: {error}")
        return f"failed ({EXIT_FAILED})", EXIT_FAILED


def of_a_point(overrides: Sequence[str]) -> list[str]:
    """The overrides that apply to a point: without sweep.* and without the sweep's run directory."""
    return [word for word in overrides if not word.startswith("sweep.") and word.partition("=")[0] not in PLACES]


def grouped(run: Run) -> list[str]:
    """The override that sets the wandb group, if there is one."""
    group = (run.sink.get("wandb") or {}).get("group")
    return [f"++sink.wandb.group={quoted(group)}"] if group else []


def quoted(value: object) -> str:
    """Quote any value for Hydra's override grammar, where backslashes are escapes only before a quote."""
    return "'{}'".format(re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), str(value)))


def say(text: str) -> None:
    print(redact(" ".join(text.split())), file=sys.stderr, flush=True)
