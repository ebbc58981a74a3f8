"""Sequential sweeps through Hydra's sweeper and launcher, and running a single point."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from launcher.config.compose import (
    PRIMARY_CONFIG_NAME,
    ComposedConfig,
    ConfigComposer,
    finalize,
    hydra_errors_as_usage_errors,
    to_container,
)
from launcher.config.overrides import RUN_DIR_KEYS, parse_overrides, with_force_add
from launcher.config.schema import RunConfig, RunDirConfig
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, UsageError, format_named_error
from launcher.sweep import outcome
from launcher.system.stderr import print_stderr

__all__ = [
    "PointFunction",
    "PointTask",
    "quote_override",
    "run_in_directory",
    "run_point",
    "run_points",
    "select_point_overrides",
]

#: Runs one point of a sweep, given its configuration and the equivalent command-line arguments.
PointFunction = Callable[[RunConfig, Sequence[str]], int]


@dataclass(frozen=True)
class PointTask:
    """How to run each point.

    `flags` precede its overrides. `shard` (k, n): run every n-th point starting at k. `own`: the points' run
    directories if they have names of their own.
    """

    point: PointFunction
    flags: tuple[str, ...] = ()
    shard: tuple[int, int] = (0, 1)
    own: tuple[RunDirConfig, ...] = ()

    def is_in_shard(self, number: int) -> bool:
        return number % self.shard[1] == self.shard[0] % self.shard[1]

    def get_own_dir(self, number: int) -> str | None:
        return self.own[number].dir if self.own else None


def run_points(
    composer: ConfigComposer, task: PointTask, folder: Path, overrides: Sequence[str]
) -> list[outcome.PointOutcome]:
    """Run every point through Hydra's sweeper and launcher, or the plugins selected by the user."""
    from hydra._internal.hydra import Hydra

    outcomes: list[outcome.PointOutcome] = []
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2(PRIMARY_CONFIG_NAME, composer.search_path)
    folder_overrides = [f"hydra.sweep.dir={quote_override(folder)}"]
    if task.own:
        folder_overrides.append("hydra.sweep.subdir=.")  # no numbered folders beside the points' own
    try:
        with hydra_errors_as_usage_errors():
            job = functools.partial(run_point, task, outcomes)
            returned = hydra.multirun(
                PRIMARY_CONFIG_NAME, job, [*with_force_add(overrides), *folder_overrides], with_log_configuration=False
            )
    finally:
        GlobalHydra.instance().clear()
        outcome.mask_hydra_file(folder / "multirun.yaml")
    return _collect_outcomes(returned) or outcomes


def _collect_outcomes(returned: Any) -> list[outcome.PointOutcome]:
    """Outcomes returned by the jobs, also from other processes; custom sweepers may return nothing."""
    batches = returned if isinstance(returned, list) else []
    jobs = [job for batch in batches if isinstance(batch, list | tuple) for job in batch]
    return [job.return_value for job in jobs if isinstance(job.return_value, outcome.PointOutcome)]


def run_point(task: PointTask, outcomes: list[outcome.PointOutcome], config: DictConfig) -> outcome.PointOutcome:
    """Hydra's task function: run one point. A failure is printed and returned, so that the next point still runs.

    After a stopped point no further point is started.
    """
    hydra = HydraConfig.get()
    folder, number = Path(hydra.sweep.dir), str(hydra.job.num)
    overrides = [str(override) for override in hydra.overrides.task]
    outcome.mask_hydra_file(folder / "multirun.yaml")
    job = int(hydra.job.num)
    if not task.is_in_shard(job) or any(earlier.stopped for earlier in outcomes):
        outcomes.append(outcome.PointOutcome(job, tuple(overrides), EXIT_OK, outcome.NOT_RUN, task.get_own_dir(job)))
        return outcomes[-1]
    print_stderr(f"point {number}: {' '.join(overrides)}")
    ended, status = run_in_directory(
        task, folder, number, lambda: finalize(to_container(config), parse_overrides(overrides)), overrides
    )
    if status == EXIT_INTERRUPTED:
        raise KeyboardInterrupt  # ends the sweep
    outcomes.append(outcome.PointOutcome(job, tuple(overrides), status, ended, task.get_own_dir(job)))
    return outcomes[-1]


def run_in_directory(
    task: PointTask, folder: Path, number: str, compose: Callable[[], ComposedConfig], overrides: Sequence[str]
) -> tuple[str, int]:
    """Run one point in its own run directory; returns the outcome word and the exit status."""
    try:
        composed = compose()
        for note in composed.notes:
            print_stderr(f"note: {note}")
        own = task.own[int(number)] if task.own else None
        config = outcome.make_point_config(composed.config, folder, number, own)
        args = [
            *task.flags,
            *select_point_overrides(overrides),
            f"run.dir={quote_override(config.run.dir)}",
            *make_group_override(config),
        ]
        status = task.point(config, args)
        return outcome.describe_outcome(config, status), status
    except UsageError as error:
        print_stderr(f"error: {error}")
        return f"failed ({EXIT_USAGE})", EXIT_USAGE
    except Exception as error:
        print_stderr(f"error: {format_named_error(type(error).__name__, str(error))}")
        return f"failed ({EXIT_FAILED})", EXIT_FAILED


def select_point_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides that apply to a point: without sweep.* and without the sweep's run directory."""
    return [word for word in overrides if not word.startswith("sweep.") and word.partition("=")[0] not in RUN_DIR_KEYS]


def make_group_override(config: RunConfig) -> list[str]:
    """The override that sets the wandb group, if there is one."""
    group = (config.sink.get("wandb") or {}).get("group")
    return [f"++sink.wandb.group={quote_override(group)}"] if group else []


def quote_override(value: object) -> str:
    """Quote any value for Hydra's override grammar, where backslashes are escapes only before a quote."""
    return "'{}'".format(re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), str(value)))
