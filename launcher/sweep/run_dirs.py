"""The run directories of a sweep's points: numbered in the sweep's folder, or named by keys that are swept over."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.compose import ComposedConfig, SweepRequest
from launcher.config.schema import RunConfig, RunDirConfig
from launcher.errors import UsageError
from launcher.run_dir.run_directory import RUNS_DIR
from launcher.sweep import outcome

__all__ = ["SweepDirs", "check_search_name", "choose_directories"]


@dataclass(frozen=True)
class SweepDirs:
    """The sweep's folder, and the run directories of its points if those have names of their own."""

    folder: Path
    own: tuple[RunDirConfig, ...] = ()


def choose_directories(
    request: SweepRequest, points: Sequence[Sequence[str]], composed: Sequence[ComposedConfig]
) -> SweepDirs:
    """Choose the folder of the sweep and, for a run.name or run.dir with ${...}, the run directory of each point.

    Raises:
        UsageError: two points have the same run directory, or another sweeper chooses the points.
    """
    if request.interpolated_run is None:
        return SweepDirs(outcome.choose_sweep_directory(request.settings.run))
    if not composed:
        raise UsageError(f"{request.interpolated_run} does not work with hydra/sweeper=: type a plain name")
    own = [make_own_directory(point.config) for point in composed]
    first_by_path: dict[str, int] = {}
    for number, run in enumerate(own):
        first_by_path.setdefault(os.path.abspath(str(run.dir)), number)
    if len(first_by_path) == 1:  # it depends on no key that is swept over
        return SweepDirs(outcome.choose_sweep_directory(composed[0].config.run))
    for number, run in enumerate(own):
        first = first_by_path[os.path.abspath(str(run.dir))]
        if first != number:
            raise UsageError(describe_duplicate(request, points, first, number, str(run.dir)))
    return SweepDirs(outcome.choose_sweep_directory(RunDirConfig()), tuple(own))


def make_own_directory(config: RunConfig) -> RunDirConfig:
    """The run directory that the point's own run.name or run.dir names."""
    path = Path(config.run.dir) if config.run.dir is not None else RUNS_DIR / str(config.run.name)
    return RunDirConfig(name=config.run.name, dir=str(path))


def describe_duplicate(
    request: SweepRequest, points: Sequence[Sequence[str]], first: int, second: int, path: str
) -> str:
    """The error for two points with the same run directory, with the keys in which they differ."""
    words = [word for word in points[second] if word not in points[first]]
    keys = [word.partition("=")[0].lstrip("+") for word in words]
    missing = f"{'-'.join(f'${{{key}}}' for key in keys)}" if keys else "another key"
    return (
        f"{request.interpolated_run}: points {first} and {second} both get {path}: "
        f"add {missing}, so that each point has a run directory of its own"
    )


def check_search_name(request: SweepRequest, configs: Sequence[RunConfig]) -> RunDirConfig:
    """Return the name of a search's folder, which all points share.

    Raises:
        UsageError: run.name or run.dir depends on a key that is searched over.
    """
    if request.interpolated_run is None:
        return request.settings.run
    if len({str(make_own_directory(config).dir) for config in configs}) > 1:
        raise UsageError(
            f"{request.interpolated_run} depends on a key that is searched over, and it names the folder of the "
            "search, which all points share: type a plain name"
        )
    return configs[0].run
