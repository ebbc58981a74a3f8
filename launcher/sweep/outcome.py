"""A sweep's folder, its points and their outcomes; `launcher.sweep.run_sweep` runs them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from launcher.config.schema import RunConfig, RunDirConfig
from launcher.errors import EXIT_OK, UsageError
from launcher.run_dir.run_directory import RunDirectory
from launcher.system.atomic_files import PRIVATE_MODE
from launcher.system.redaction import mask_nested_secrets
from launcher.system.run_files import RUN_NAME_PATTERN
from launcher.telemetry.wandb_env import get_wandb_group, get_wandb_run_id

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
    "refuse_shared_wandb_run",
]

FINISHED, STOPPED, NOT_RUN = "finished", "stopped", "not run"


@dataclass(frozen=True)
class PointOutcome:
    """Outcome of one point: number, overrides, exit status, and that status in a word.

    `run_dir`: its run directory if that has a name of its own, else it is numbered in the sweep's folder.
    """

    number: int
    overrides: tuple[str, ...]
    status: int
    ended: str = FINISHED
    run_dir: str | None = None

    @property
    def stopped(self) -> bool:
        return self.ended == STOPPED

    def get_path(self, folder: Path) -> Path:
        """The run directory, given the sweep's folder."""
        return folder / str(self.number) if self.run_dir is None else Path(self.run_dir)

    @property
    def label(self) -> str:
        return str(self.number) if self.run_dir is None else Path(self.run_dir).name


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


def make_point_config(config: RunConfig, folder: Path, number: int | str, own: RunDirConfig | None = None) -> RunConfig:
    """Configure point `number`: a run directory `<folder>/<number>`, or its `own`, and the sweep's wandb group."""
    name = f"{folder.name}-{number}"
    if "wandb" in config.sink:
        options = config.sink["wandb"] or {}
        options = {**options, "group": options.get("group") or get_wandb_group() or folder.name}
        config = replace(config, sink={**config.sink, "wandb": options})
    numbered = RunDirConfig(name=name if RUN_NAME_PATTERN.fullmatch(name) else None, dir=str(folder / str(number)))
    return replace(config, run=own or numbered)


def refuse_shared_wandb_run(sinks: Iterable[str]) -> None:
    """Refuse a sweep whose points would all be written into one run in W&B.

    Raises:
        UsageError: WANDB_RUN_ID is set, as under `wandb agent`, and wandb is among the sinks.
    """
    run_id = get_wandb_run_id()
    if run_id and "wandb" in sinks:
        raise UsageError(
            f"WANDB_RUN_ID={run_id} names one run, and -m makes one of each point: type env -u WANDB_RUN_ID before the "
            "command, or sink=console"
        )


def mask_hydra_file(file: Path) -> None:
    """Mask the secrets in the file written by Hydra, and make it readable by the user only."""
    if not file.is_file() or file.is_symlink():
        return
    masked = yaml.safe_dump(mask_nested_secrets(yaml.safe_load(file.read_text(encoding="utf-8"))), sort_keys=False)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, PRIVATE_MODE), "w", encoding="utf-8") as stream:
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
