"""A sweep's folder, its points and their outcomes; `launcher.sweep.run_sweep` runs them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from launcher.config.schema import RunConfig, RunDirConfig
from launcher.errors import EXIT_OK, UsageError
from launcher.run_dir.run_directory import RunDirectory
from launcher.system.redaction import mask_nested_secrets
from launcher.system.run_files import RUN_NAME_PATTERN

__all__ = [
    "FINISHED",
    "NOT_RUN",
    "STOPPED",
    "PointOutcome",
    "choose_sweep_directory",
    "describe_outcome",
    "find_worst_status",
    "make_point_config",
    "mask_hydra_file",
]

FINISHED, STOPPED, NOT_RUN = "finished", "stopped", "not run"


@dataclass(frozen=True)
class PointOutcome:
    """Outcome of one point: number, overrides, exit status, and that status in a word."""

    number: int
    overrides: tuple[str, ...]
    status: int
    ended: str = FINISHED

    @property
    def stopped(self) -> bool:
        return self.ended == STOPPED


def choose_sweep_directory(run: RunDirConfig, now: float | None = None) -> Path:
    """The sweep's folder: run.dir, runs/<run.name>, or a new one named after the time `now` (UNIX seconds)."""
    if run.dir is not None:
        return Path(run.dir)
    if run.name is not None:
        if not RUN_NAME_PATTERN.fullmatch(run.name):
            raise UsageError(f"run.name={run.name}: type up to 64 letters, digits, '.', '_' and '-'")
        return Path("runs") / run.name
    first = Path("runs") / time.strftime("sweep-%Y%m%d-%H%M%S", time.localtime(now))
    candidates = [first, *(first.with_name(f"{first.name}-{count}") for count in range(2, 100))]
    return next(folder for folder in candidates if not folder.exists())


def make_point_config(config: RunConfig, folder: Path, number: int | str) -> RunConfig:
    """Configure point `number`: a run directory `<folder>/<number>`, and the wandb group shared by the sweep."""
    name = f"{folder.name}-{number}"
    if "wandb" in config.sink:
        options = config.sink["wandb"] or {}
        options = {**options, "group": options.get("group") or folder.name}
        config = replace(config, sink={**config.sink, "wandb": options})
    return replace(
        config, run=RunDirConfig(name=name if RUN_NAME_PATTERN.fullmatch(name) else None, dir=str(folder / str(number)))
    )


def mask_hydra_file(file: Path) -> None:
    """Mask the secrets in the file written by Hydra, and make it readable by the user only."""
    if not file.is_file() or file.is_symlink():
        return
    masked = yaml.safe_dump(mask_nested_secrets(yaml.safe_load(file.read_text(encoding="utf-8"))), sort_keys=False)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w", encoding="utf-8") as stream:
        stream.write(masked)
    temporary.replace(file)


def find_worst_status(outcomes: Sequence[PointOutcome]) -> int:
    return max((outcome.status for outcome in outcomes), default=EXIT_OK)


def describe_outcome(config: RunConfig, status: int) -> str:
    """Outcome word for the exit status of a point that has run or was submitted to Slurm."""
    if status != EXIT_OK:
        return f"failed ({status})"
    if config.launch.kind == "slurm":
        return "submitted"
    return FINISHED if RunDirectory(Path(str(config.run.dir))).done_json.exists() else STOPPED
