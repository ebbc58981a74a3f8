"""A run's folder: its files, its lock, its generations, and how it gets its name."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher.errors import RequestError
from launcher.process import started_at

__all__ = ["RUNS", "Lock", "RunFolder", "free_name", "recall", "remember"]

RUNS = Path("runs")
AGENTS = RUNS / ".agents"


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run, and the few files that are read and written whole. Everything is private to the user."""

    path: Path

    @property
    def run_yaml(self) -> Path:
        return self.path / "run.yaml"

    @property
    def plan_json(self) -> Path:
        return self.path / "plan.json"

    @property
    def done_json(self) -> Path:
        return self.path / "done.json"

    @property
    def stop_file(self) -> Path:
        return self.path / "stop"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    def log(self, rank: int, generation: int) -> Path:
        return self.logs / f"rank{rank}-g{generation}.log"

    def create(self) -> None:
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        os.makedirs(self.logs, mode=0o700, exist_ok=True)

    def generation(self) -> int:
        """How often the workers of this run have been started; 0 before the first time."""
        try:
            return int((self.path / "generation").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def next_generation(self) -> int:
        number = self.generation() + 1
        write_whole(self.path / "generation", f"{number}\n")
        return number

    def clear_stop(self) -> None:
        self.stop_file.unlink(missing_ok=True)

    def read_done(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self.done_json.read_text()))
        except (FileNotFoundError, ValueError):
            return None

    def write_json(self, path: Path, facts: Mapping[str, Any]) -> None:
        write_whole(path, json.dumps(facts, indent=1) + "\n")

    def wandb_id(self) -> str:
        """The same for every restart: made once, kept in the folder."""
        kept = self.path / "wandb-id"
        if not kept.exists():
            write_whole(kept, os.urandom(4).hex())
        return kept.read_text().strip()

    def lock(self) -> Lock:
        """Take the folder for this process.

        Raises:
            RequestError: another living process has it; it is named.
        """
        return Lock(self.path)


class Lock:
    """An flock: the kernel lets go of it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self._file = open(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600), "r+")  # noqa: SIM115 (held)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise RequestError(
                f"{folder} is in use by {owner}: wait for it, stop it, or type another run.name="
            ) from None
        self._file.seek(0)
        self._file.truncate()
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def write_whole(path: Path, text: str) -> None:
    """The whole new file or the old one, private, durable."""
    fresh = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    number = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def free_name(recipe: str, job: str | None, now: datetime) -> str:
    """`<recipe>-<job>`, the same for a requeued Slurm job; else `<recipe>-<time>`, not taken yet."""
    if job is not None:
        return f"{recipe}-{job}"
    name = f"{recipe}-{now:%Y%m%d-%H%M%S}"
    taken = {path.name for path in RUNS.iterdir()} if RUNS.is_dir() else set()
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10_000))) if n not in taken)


def recall() -> Path | None:
    """The folder that an earlier worker of the same agent decided on: under a torchrun of the user's own it must
    outlive restarts. None where this is the first start."""
    try:
        return Path(memory().read_text())
    except FileNotFoundError:
        return None


def remember(folder: Path) -> None:
    """Keep the decision by host, the agent's pid and when that was started; what belongs to dead agents is removed."""
    os.makedirs(AGENTS, mode=0o700, exist_ok=True)
    host = socket.gethostname()
    for old in AGENTS.glob(f"{host}-*"):
        pid, start = old.name.removeprefix(f"{host}-").split("-")
        if str(started_at(int(pid))) != start:
            old.unlink(missing_ok=True)
    write_whole(memory(), str(folder))


def memory() -> Path:
    agent = os.getppid()
    return AGENTS / f"{socket.gethostname()}-{agent}-{started_at(agent)}"
