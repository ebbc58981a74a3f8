"""A run's folder: its files, its lock, its generations, and how it gets its name."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from launcher.durable import private_folder, write_whole
from launcher.errors import RequestError
from launcher.process import started_at

__all__ = [
    "RUNS",
    "Lock",
    "RunFolder",
    "free_name",
    "named_folder",
    "recall",
    "recipe_name",
    "remember",
    "runs_with",
    "write_whole",
]

RUNS = Path("runs")
AGENTS = RUNS / ".agents"
MOST_TOLD = 5
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


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
    def profile_json(self) -> Path:
        """Under batch=goodput, the measured update times."""
        return self.path / "profile.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def done_json(self) -> Path:
        return self.path / "done.json"

    @property
    def stop_file(self) -> Path:
        return self.path / "stop"

    @property
    def gate(self) -> Path:
        """What waits here would join the job once its workers have saved: a file per node, named by it."""
        return self.path / ".gate"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    def checkpoints_in(self, elsewhere: str | None) -> Path:
        """This run's own folder in `checkpoint.dir`, where that is given: another run's checkpoints are not its own."""
        if not elsewhere:
            return self.checkpoints
        return Path(elsewhere) / (self.path.relative_to(RUNS) if self.path.is_relative_to(RUNS) else self.path.name)

    @property
    def slurm_json(self) -> Path:
        """Which Slurm job has the folder; written by its script each time it is started."""
        return self.path / "slurm.json"

    def log(self, rank: int, generation: int) -> Path:
        return self.logs / f"rank{rank}-g{generation}.log"

    def create(self) -> Path | None:
        """Make the folder and what lies in it; what is there stays. Returns the uppermost folder that was made.

        Raises:
            RequestError: it cannot be made, or a part of it is a link that leads elsewhere.
        """
        absent = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            for folder in (self.path, self.logs, self.checkpoints):
                private_folder(folder)
        except OSError as problem:
            raise RequestError(
                f"run.dir={self.path} cannot be created ({problem.strerror}): type another run.dir="
            ) from problem
        for folder in (self.logs, self.checkpoints):
            if folder.is_symlink() or not folder.is_dir():
                raise RequestError(f"{folder} is no folder of its own: remove it, or type another run.name=")
        return absent[-1] if absent else None

    def discard(self, made: Path) -> None:
        """Remove a folder in which nothing was trained, and those above it up to `made`, as far as they are empty."""
        if any(self.checkpoints.iterdir()) or (self.metrics.exists() and self.metrics.stat().st_size):
            return
        shutil.rmtree(self.path)
        for parent in self.path.parents:
            if not parent.is_relative_to(made):
                break
            with suppress(OSError):
                parent.rmdir()

    def generation(self) -> int:
        """How often the workers of this run have been started; 0 before the first time.

        Raises:
            RequestError: it cannot be known: rows of metrics.jsonl would supersede the wrong ones.
        """
        kept = self.path / "generation"
        try:
            return int(kept.read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            raise RequestError(f"{kept} holds no number: write the last generation of metrics.jsonl into it") from None

    def next_generation(self) -> int:
        number = self.generation() + 1
        write_whole(self.path / "generation", f"{number}\n")
        return number

    def restarts(self) -> int:
        """How many of those starts replaced workers of a job under way, and were no new command."""
        try:
            return int((self.path / "restarts").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def count_restart(self) -> None:
        write_whole(self.path / "restarts", f"{self.restarts() + 1}\n")

    def saved_generation(self) -> int:
        """The last start of the workers that saved a checkpoint; 0 before the first."""
        try:
            return int((self.path / "saved").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def saved(self, generation: int) -> None:
        write_whole(self.path / "saved", f"{generation}\n")

    def clear_stop(self) -> None:
        self.stop_file.unlink(missing_ok=True)

    def ask_to_stop(self, why: str) -> None:
        """`why`: by what. A full disk still has room for a name."""
        try:
            write_whole(self.stop_file, why)
        except OSError:
            self.stop_file.touch(0o600)

    def asks_to_stop(self) -> bool:
        return self.stop_file.exists()

    def stop_reason(self) -> str:
        """What the stop was asked for by; empty where the stop file does not say, or is none."""
        try:
            return self.stop_file.read_text(errors="replace").strip() if self.stop_file.is_file() else ""
        except OSError:
            return ""

    def asks_to_join(self) -> bool:
        """Whether a node waits at the gate."""
        try:
            with os.scandir(self.gate) as waiting:
                return next(waiting, None) is not None
        except FileNotFoundError:
            return False

    def let_in(self) -> list[str]:
        """Open the gate: what waits there, which has to be saved for first, goes on and joins. Who was there."""
        waiting = sorted(self.gate.iterdir()) if self.gate.is_dir() else []
        for mark in waiting:
            mark.unlink(missing_ok=True)
        return [mark.name for mark in waiting]

    def read_done(self) -> dict[str, Any] | None:
        """What done.json says; None where training is not complete.

        Raises:
            RequestError: it cannot be read.
        """
        try:
            done = json.loads(self.done_json.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            done = None
        if not isinstance(done, dict) or not isinstance(done.get("samples"), int):
            raise RequestError(f"{self.done_json} cannot be read: remove it, and the run goes on from its checkpoint")
        return done

    def read_plan(self) -> dict[str, Any] | None:
        """The plan that was last in force; None before the first."""
        try:
            plan = json.loads(self.plan_json.read_text())
        except (OSError, ValueError):
            return None
        return plan if isinstance(plan, dict) and "world" in plan else None

    def write_done(self, facts: Mapping[str, Any]) -> None:
        """The last word of a run: everything else is on the disk before."""
        write_whole(self.done_json, json.dumps(facts, indent=1) + "\n")

    def wandb_id(self) -> str:
        """The same for every restart: made once, kept in the folder."""
        kept = self.path / "wandb-id"
        if not kept.exists():
            write_whole(kept, os.urandom(4).hex())
        return kept.read_text().strip()

    def lock(self, torchrun: int | None = None) -> Lock:
        """Take the folder for this process, a worker of the user's own `torchrun` where that is given.

        Raises:
            RequestError: another living process has it; it is named.
        """
        return Lock(self.path, torchrun)


class Lock:
    """An flock: the kernel lets go of it when the process ends, however it ends."""

    def __init__(self, folder: Path, torchrun: int | None = None) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._file = open(os.open(folder / ".lock", flags, 0o600), "r+")  # noqa: SIM115 (held)
        try:
            take(self._file)
        except OSError as problem:
            owner = self._file.read().strip() or "another process"
            self._file.close()
            if problem.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise RequestError(
                    f"{folder} cannot be locked ({problem.strerror}): type run.dir= on a file system with locks"
                ) from problem
            raise RequestError(
                f"{folder} is in use by {owner}: wait for it, stop it, or type another run.name="
            ) from None
        os.register_at_fork(after_in_child=self._file.close)  # a loader process must not keep it when its rank dies
        self._file.seek(0)
        self._file.truncate()
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        of = f" of torchrun {torchrun}" if torchrun else ""
        self._file.write(f"process {os.getpid()}{of} on {socket.gethostname()} since {since}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def take(file: IO[str]) -> None:
    """Lock it, if need be at a second try: who asks whether a run is running has its lock for a moment, too.

    Raises:
        OSError: somebody has it for longer, or there are no locks here.
    """
    for _ in range(9):
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.03)
    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- names --------------------------------------------------------------------------------------------------------


def named_folder(name: str) -> Path:
    """`runs/<name>`, which never lies anywhere else.

    Raises:
        RequestError: the name is none, or a link of that name leads out of runs/.
    """
    if not NAME.fullmatch(name):
        given = " ".join(name.split())  # a refusal is one line
        raise RequestError(
            f"run.name={given}: type up to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
        )
    folder = RUNS / name
    if folder.is_symlink() and folder.resolve().parent != RUNS.resolve():
        raise RequestError(f"run.name={name} is a link that leads out of {RUNS}/: type run.dir={folder.resolve()}")
    return folder


def free_name(recipe: str, job: str | None, now: datetime) -> str:
    """`<recipe>-<job>`, the same for a requeued job; else `<recipe>-<time>`, of a folder that is not there yet.

    Raises:
        RequestError: the job's id, which the user may choose, makes no name.
    """
    if job is not None:
        return named_folder(f"{recipe}-{job}").name
    name = f"{recipe}-{now:%Y%m%d-%H%M%S}"
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10_000))) if not os.path.lexists(named_folder(n)))


def recipe_name(target: str) -> str:
    """`resnet` of `launcher.recipes.resnet.ResNet`; a class of the user's own by its own name."""
    module, _, name = target.rpartition(".")
    return (module.rpartition(".")[2] if module.startswith("launcher.recipes.") else name).lower()


def runs_with(file: str) -> str:
    """Which runs have such a file, the newest first, for one who typed a name that is none."""
    found = [(path.stat().st_mtime, path.parent.name) for path in RUNS.glob(f"*/{file}") if path.is_file()]
    names = [name for _, name in sorted(found, reverse=True)]
    if not names:
        return f"there is none in {RUNS}/ here"
    more = f" and {len(names) - MOST_TOLD} more" if len(names) > MOST_TOLD else ""
    return f"there are {', '.join(names[:MOST_TOLD])}{more}"


# --- what outlives a restart under a torchrun of the user's own ---------------------------------------------------


@dataclass(frozen=True)
class Recalled:
    """The folder that the first worker of an agent trained in, and which was the newest checkpoint before."""

    folder: Path
    newest: str | None = None

    def to_json(self) -> str:
        return json.dumps({"folder": str(self.folder), "newest": self.newest})

    @classmethod
    def from_json(cls, text: str) -> Recalled:
        kept = json.loads(text)
        return cls(Path(kept["folder"]), kept["newest"])


def recall() -> Recalled | None:
    """What an earlier worker of the same agent knew; None where this is the agent's first start of its workers."""
    try:
        return Recalled.from_json(memory().read_text())
    except FileNotFoundError:
        return None


def remember(decided: Recalled) -> None:
    """Keep the decision by host, the agent's pid and when that was started; what belongs to dead agents is removed."""
    private_folder(AGENTS)
    for old in AGENTS.iterdir():
        host, _, agent = old.name.rpartition("@")
        pid, _, start = agent.partition("-")
        if host == socket.gethostname() and pid.isdigit() and str(started_at(int(pid))) != start:
            old.unlink(missing_ok=True)
    write_whole(memory(), decided.to_json())


def memory() -> Path:
    agent = os.getppid()
    return AGENTS / f"{socket.gethostname()}@{agent}-{started_at(agent)}"
