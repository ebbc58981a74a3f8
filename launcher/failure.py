"""A rank's last words: written where it fails, shown last on the screen by the driver."""

from __future__ import annotations

import json
import signal
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_FAILED, EXIT_REQUEST, RequestError
from launcher.reading import Event
from launcher.redact import redact
from launcher.runfolder import write_whole

__all__ = [
    "Failure",
    "cause",
    "consequence",
    "departed",
    "first",
    "hung",
    "left",
    "record",
    "speaks",
    "tell_torchrun",
    "those",
    "whole_lines",
    "written",
]

SPEAK_WITHIN_S = 0.4
HANG = "Hang"
#: What a rank says whose peer has gone: a consequence, never the cause.
CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "Timed out waiting",
    "gloo",
)


@dataclass(frozen=True)
class Failure:
    """What went wrong in one rank. `final`: it would go wrong again if the workers were started again."""

    rank: int
    generation: int
    type: str
    message: str
    where: str
    time: float
    status: int
    final: bool
    log: str
    traceback: str

    @classmethod
    def of(cls, rank: int, generation: int, error: BaseException, log: Path, *, final: bool = False) -> Failure:
        """Secrets masked."""
        request = isinstance(error, RequestError)
        return cls(
            rank=rank,
            generation=generation,
            type=type(error).__name__,
            message=redact(" ".join(str(error).split())),
            where="" if request else where(error),
            time=time.time(),
            status=EXIT_REQUEST if request else EXIT_FAILED,
            final=request or final,
            log=str(log),
            traceback=redact("".join(traceback.format_exception(error))),
        )

    def event(self) -> Event:
        names = ("rank", "generation", "type", "message", "where", "log")
        return Event(self.time, "error", {name: getattr(self, name) for name in names})

    def line(self) -> str:
        if self.status == EXIT_REQUEST:
            return self.message
        at = f" in {self.where}" if self.where else ""
        return f"rank {self.rank} failed{at}: {self.type}: {self.message} (log: {self.log})"


def record(logs: Path, rank: int, generation: int, error: BaseException, log: Path, *, final: bool = False) -> Failure:
    """Write `error-g<generation>-r<rank>.json` beside the logs."""
    failure = Failure.of(rank, generation, error, log, final=final)
    write(logs, failure)
    return failure


def hung(logs: Path, rank: int, generation: int, where: str, why: str, log: Path) -> None:
    """The last word of a rank that can't speak for itself, written by the one that found it."""
    write(logs, Failure(rank, generation, HANG, why, where, time.time(), EXIT_FAILED, False, str(log), ""))


def write(logs: Path, failure: Failure) -> None:
    write_whole(logs / f"error-g{failure.generation}-r{failure.rank}.json", json.dumps(asdict(failure)))


def where(error: BaseException) -> str:
    """File and line of the innermost frame that is the user's own, else of the innermost one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and f"{Path(__file__).parent}/" not in f.filename]
    chosen = (own or list(frames))[-1:]
    return f"{shortened(chosen[0].filename)}:{chosen[0].lineno}" if chosen else ""


def shortened(name: str) -> str:
    try:
        return str(Path(name).relative_to(Path.cwd()))
    except ValueError:
        return name


def first(logs: Path, since: int) -> Failure | None:
    """The first real error from generation `since` on; a consequence of it only where there is no other."""
    found = [failure for failure in those(logs) if failure.generation >= since]
    return min(found, key=lambda f: (consequence(f.message), f.generation, f.time), default=None)


def cause(logs: Path, generation: int) -> Failure | None:
    """The first real error in one start of the workers; None where none of them wrote one down."""
    own = [failure for failure in those(logs, generation) if not consequence(failure.message)]
    return min(own, key=lambda failure: failure.time, default=None)


def written(events: Path, found: Failure) -> bool:
    """Whether the events tell of it already; of a hang the rank that found it has told."""
    return found.type == HANG or any(
        line.get("event") == "error" and (line.get("rank"), line.get("generation")) == (found.rank, found.generation)
        for line in whole_lines(events)
    )


def whole_lines(events: Path) -> Iterator[dict[str, Any]]:
    for line in events.read_text(errors="replace").split("\n") if events.exists() else []:
        with suppress(ValueError):  # what a kill cut off
            yield json.loads(line)


def those(logs: Path, generation: int | None = None) -> list[Failure]:
    """What has been written down so far, in one generation or in all."""
    found = []
    for path in logs.glob(f"error-g{'*' if generation is None else generation}-r*.json"):
        with suppress(OSError, ValueError, TypeError):  # it is being written
            found.append(Failure(**json.loads(path.read_text())))
    return found


def speaks(logs: Path, own: Failure, within_s: float = SPEAK_WITHIN_S) -> bool:
    """Whether this rank is the one to tell the user: the lowest of those that failed by themselves.

    Rank 0's own error is told at once; the others first see what the ranks before them say. Who failed because of
    another waits twice as long: once it has left, torchrun ends those that still wait.
    """
    if own.rank == 0 and not consequence(own.message):
        return True
    time.sleep(2 * within_s if consequence(own.message) else within_s)
    chosen = min((own, *those(logs, own.generation)), key=lambda f: (consequence(f.message), f.rank))
    return chosen.rank == own.rank


def consequence(message: str) -> bool:
    """Whether an error's message only tells that another rank has gone."""
    return any(word in message for word in CONSEQUENCES)


def departed(codes: Mapping[int, int]) -> str:
    """What can be said of ranks that left no word, given their exit codes; empty where there are none."""
    told = sorted(codes.items(), key=lambda item: item[1] == -signal.SIGTERM)
    return next((left(f"rank {rank}", code) for rank, code in told), "")


def left(who: str, code: int) -> str:
    """How a process ended: by its exit code, or below 0 by the signal of that number."""
    if code == -signal.SIGKILL:
        return f"{who} was killed by SIGKILL: out of memory?"
    return f"{who} was ended by {signal.Signals(-code).name}" if code < 0 else f"{who} left with {code}"


def tell_torchrun(error: BaseException) -> None:
    """Have torchrun's own summary name the error instead of `error_file: <N/A>`."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)
