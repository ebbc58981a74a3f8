"""The run directory: its files, its lock, its generation counter, and its name."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from launcher.run_dir.lock import RunDirLock
from launcher.run_dir.outward_links import refuse_outward_links
from launcher.system.atomic_files import atomic_write_text, make_durable_dir
from launcher.system.run_files import (
    BEST_MODEL_FILE,
    CHECKPOINTS_DIR,
    DONE_FILE,
    EVENTS_FILE,
    LOGS_DIR,
    METRICS_FILE,
    MODEL_FILE,
    PLAN_FILE,
    PROFILE_FILE,
    RUN_NAME_PATTERN,
    RUN_YAML_FILE,
    SLURM_FILE,
    STOP_FILE,
    WANDB_DIR,
)

__all__ = [
    "RUNS_DIR",
    "RunDirectory",
    "format_recipe_name",
    "resolve_named_dir",
    "suggest_runs",
    "unique_run_name",
]

RUNS_DIR = Path("runs")
MAX_SUGGESTED_RUNS = 5
# Small files that only this class reads and writes; `launcher.system.run_files` has the others.
GENERATION_FILE = "generation"
RESTARTS_FILE = "restarts"
SAVED_GENERATION_FILE = "saved"
TRAINED_GENERATION_FILE = "trained"
WANDB_ID_FILE = "wandb-id"


@dataclass(frozen=True)
class RunDirectory:
    """Paths in one run directory, and access to its small files."""

    path: Path

    @property
    def run_yaml(self) -> Path:
        return self.path / RUN_YAML_FILE

    @property
    def plan_json(self) -> Path:
        return self.path / PLAN_FILE

    @property
    def profile_json(self) -> Path:
        """The measured update times that batch=goodput uses."""
        return self.path / PROFILE_FILE

    @property
    def metrics(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def events(self) -> Path:
        return self.path / EVENTS_FILE

    @property
    def wandb(self) -> Path:
        return self.path / WANDB_DIR

    @property
    def done_json(self) -> Path:
        return self.path / DONE_FILE

    @property
    def stop_file(self) -> Path:
        return self.path / STOP_FILE

    @property
    def join_requests_dir(self) -> Path:
        """Nodes waiting to join the job after its next checkpoint: one file per node, named after it."""
        return self.path / ".gate"

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS_DIR

    @property
    def logs(self) -> Path:
        return self.path / LOGS_DIR

    @property
    def model(self) -> Path:
        return self.path / MODEL_FILE

    @property
    def best_model(self) -> Path:
        """The parameters with the best value of `checkpoint.best`, if that names a metric."""
        return self.path / BEST_MODEL_FILE

    def resolve_checkpoints_dir(self, checkpoint_dir: str | None) -> Path:
        """Return the checkpoint folder: a subfolder per run if `checkpoint.dir` is set, so that runs do not mix."""
        if not checkpoint_dir:
            return self.checkpoints
        is_named = self.path.is_relative_to(RUNS_DIR)
        return Path(checkpoint_dir) / (self.path.relative_to(RUNS_DIR) if is_named else self.path.name)

    @property
    def slurm_json(self) -> Path:
        """The Slurm job that owns the directory; written by the job script at every start."""
        return self.path / SLURM_FILE

    def get_log_path(self, rank: int, generation: int) -> Path:
        return self.logs / f"rank{rank}-g{generation}.log"

    def create(self) -> Path | None:
        """Create the directory and its subfolders; existing files stay. Return the topmost folder that was created.

        Raises:
            UsageError: it cannot be created, a subfolder is a symbolic link, or a link leads out of it.
        """
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            for folder in (self.path, self.logs, self.checkpoints):
                make_durable_dir(folder)
        except OSError as problem:
            raise UsageError(
                f"run.dir={self.path} cannot be created ({problem.strerror}): type another run.dir="
            ) from problem
        for folder in (self.logs, self.checkpoints):
            if folder.is_symlink() or not folder.is_dir():
                raise UsageError(f"{folder} is a link or not a folder: remove it, or type another run.name=")
        refuse_outward_links(self.path)
        return missing[-1] if missing else None

    def discard(self, created: Path) -> None:
        """Remove the directory if nothing was trained in it, and its empty parents up to `created`."""
        if any(self.checkpoints.iterdir()) or (self.metrics.exists() and self.metrics.stat().st_size):
            return
        shutil.rmtree(self.path)
        for parent in self.path.parents:
            if not parent.is_relative_to(created):
                break
            with suppress(OSError):
                parent.rmdir()

    def set_aside_records(self) -> None:
        """Move the records of a run that is replaced to the logs, so that they do not mix with those of the new one."""
        generation = self.read_generation()
        names = (METRICS_FILE, EVENTS_FILE, PLAN_FILE, PROFILE_FILE, WANDB_ID_FILE)
        for file in [self.path / name for name in names if (self.path / name).exists()]:
            file.rename(self.logs / f"{file.stem}-g{generation}{file.suffix}")

    def read_generation(self) -> int:
        """Return how often the workers of this run have been started; 0 before the first start.

        Raises:
            UsageError: the file is damaged; with a wrong number, rows of metrics.jsonl would supersede wrong rows.
        """
        file = self.path / GENERATION_FILE
        try:
            return int(file.read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            raise UsageError(f"{file} has no number: write the last generation of metrics.jsonl into it") from None

    def increment_generation(self) -> int:
        generation = self.read_generation() + 1
        atomic_write_text(self.path / GENERATION_FILE, f"{generation}\n")
        return generation

    def read_restarts(self) -> int:
        """Return how many of those starts were restarts within a job rather than new commands."""
        return self._read_number(RESTARTS_FILE)

    def increment_restarts(self) -> None:
        atomic_write_text(self.path / RESTARTS_FILE, f"{self.read_restarts() + 1}\n")

    def read_saved_generation(self) -> int:
        """Return the last generation that saved a checkpoint; 0 before the first checkpoint."""
        return self._read_number(SAVED_GENERATION_FILE)

    def record_saved_generation(self, generation: int) -> None:
        atomic_write_text(self.path / SAVED_GENERATION_FILE, f"{generation}\n")

    def read_trained_generation(self) -> int:
        """Return the last generation that finished an update; 0 before the first update."""
        return self._read_number(TRAINED_GENERATION_FILE)

    def record_trained_generation(self, generation: int) -> None:
        atomic_write_text(self.path / TRAINED_GENERATION_FILE, f"{generation}\n")

    def _read_number(self, name: str) -> int:
        try:
            return int((self.path / name).read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def clear_stop(self) -> None:
        self.stop_file.unlink(missing_ok=True)

    def request_stop(self, source: str) -> None:
        """Request a stop that `source` is reported as the origin of; on a full disk an empty file still requests it.

        It is not written durably: a signal handler must not wait for a busy disk.
        """
        temporary = self.stop_file.with_name(f".tmp-stop-{os.getpid()}")
        try:
            temporary.write_text(source)
            temporary.replace(self.stop_file)
        except OSError:
            temporary.unlink(missing_ok=True)
            self.stop_file.touch()

    def stop_requested(self) -> bool:
        return self.stop_file.exists()

    def read_stop_reason(self) -> str:
        """Return the origin of the stop request; empty if the stop file is empty, unreadable or not a regular file."""
        try:
            return self.stop_file.read_text(errors="replace").strip() if self.stop_file.is_file() else ""
        except OSError:
            return ""

    def join_requested(self) -> bool:
        """Whether a node is waiting to join."""
        try:
            with os.scandir(self.join_requests_dir) as requests:
                return next(requests, None) is not None
        except FileNotFoundError:
            return False

    def admit_nodes(self) -> list[str]:
        """Admit the waiting nodes and return their names. Call it only after a checkpoint has been saved."""
        requests = sorted(self.join_requests_dir.iterdir()) if self.join_requests_dir.is_dir() else []
        for request in requests:
            request.unlink(missing_ok=True)
        return [request.name for request in requests]

    def read_done(self) -> dict[str, Any] | None:
        """Return the content of done.json; None if training is not complete.

        Raises:
            UsageError: the file cannot be read.
        """
        try:
            done = json.loads(self.done_json.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            done = None
        if not isinstance(done, dict) or not isinstance(done.get("samples"), int):
            raise UsageError(f"{self.done_json} cannot be read: remove it, and the run continues from its checkpoint")
        return done

    def read_plan(self) -> dict[str, Any] | None:
        """Return the plan last in force; None before the first."""
        try:
            plan = json.loads(self.plan_json.read_text())
        except (OSError, ValueError):
            return None
        return plan if isinstance(plan, dict) and "world" in plan else None

    def write_done(self, facts: Mapping[str, Any]) -> None:
        """Mark the run as complete. Written last, when everything else is on disk."""
        metrics = {name: value if math.isfinite(value) else None for name, value in facts.get("metrics", {}).items()}
        atomic_write_text(self.done_json, json.dumps({**facts, "metrics": metrics}, indent=1) + "\n")

    def ensure_wandb_id(self, required: str | None = None) -> str:
        """Return the W&B run id; created once and kept in the directory, so that restarts use the same id.

        `required`: the id that the run must have, which replaces another one.
        """
        file = self.path / WANDB_ID_FILE
        kept = file.read_text().strip() if file.exists() else None
        if kept is None or required not in (None, kept):
            kept = required or os.urandom(4).hex()
            atomic_write_text(file, kept)
        return kept

    def lock(self, torchrun: int | None = None) -> RunDirLock:
        """Lock the directory for this process. `torchrun`: pid of the torchrun that the user started, if any.

        Raises:
            UsageError: another live process holds the lock; the message names it.
        """
        return RunDirLock(self.path, torchrun)


# --- names --------------------------------------------------------------------------------------------------------


def resolve_named_dir(name: str) -> Path:
    """Return `runs/<name>` and ensure that it lies inside runs/.

    Raises:
        UsageError: the name is invalid, or is a symbolic link that points outside runs/.
    """
    if not RUN_NAME_PATTERN.fullmatch(name):
        one_line = " ".join(name.split())
        raise UsageError(
            f"run.name={one_line}: type up to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
        )
    folder = RUNS_DIR / name
    if folder.is_symlink() and folder.resolve().parent != RUNS_DIR.resolve():
        raise UsageError(f"run.name={name} is a link that points outside {RUNS_DIR}/: type run.dir={folder.resolve()}")
    return folder


def unique_run_name(recipe: str, job: str | None, now: datetime) -> str:
    """Return `<recipe>-<job>`, stable across requeues; without a job `<recipe>-<time>`, made unique in runs/.

    Raises:
        UsageError: the job id, which the user may choose, is not valid in a name.
    """
    if job is not None:
        return resolve_named_dir(f"{recipe}-{job}").name
    name = f"{recipe}-{now:%Y%m%d-%H%M%S}"
    candidates = (name, *(f"{name}-{i}" for i in range(2, 10_000)))
    return next(candidate for candidate in candidates if not os.path.lexists(resolve_named_dir(candidate)))


def format_recipe_name(target: str) -> str:
    """Return `resnet` for `launcher.recipes.resnet.ResNet`, and the lower-case class name for a custom recipe."""
    module, _, name = target.rpartition(".")
    return (module.rpartition(".")[2] if module.startswith("launcher.recipes.") else name).lower()


def suggest_runs(file: str) -> str:
    """List the runs that contain `file`, newest first, for error messages about an unknown run name."""
    runs = [(path.stat().st_mtime, path.parent.name) for path in RUNS_DIR.glob(f"*/{file}") if path.is_file()]
    names = [name for _, name in sorted(runs, reverse=True)]
    if not names:
        return f"there are no runs in {RUNS_DIR}/"
    more = f" and {len(names) - MAX_SUGGESTED_RUNS} more" if len(names) > MAX_SUGGESTED_RUNS else ""
    return f"the most recent are {', '.join(names[:MAX_SUGGESTED_RUNS])}{more}"
