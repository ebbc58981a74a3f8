"""A rank's last words: written where it fails, shown last on the screen by the driver."""

from __future__ import annotations

import json
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.errors import EXIT_FAILED, EXIT_REQUEST, RequestError
from launcher.redact import redact
from launcher.runfolder import write_whole

__all__ = ["Failure", "consequence", "first", "hung", "record", "speaks", "tell_torchrun", "those"]

SPEAK_WITHIN_S = 0.4
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

    def line(self) -> str:
        if self.status == EXIT_REQUEST:
            return self.message
        at = f" in {self.where}" if self.where else ""
        return f"rank {self.rank} failed{at}: {self.type}: {self.message} (log: {self.log})"


def record(logs: Path, rank: int, generation: int, error: BaseException, log: Path, *, final: bool = False) -> Failure:
    """Write `error-g<generation>-r<rank>.json` beside the logs, secrets masked."""
    request = isinstance(error, RequestError)
    failure = Failure(
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
    write(logs, failure)
    return failure


def hung(logs: Path, rank: int, generation: int, where: str, why: str, log: Path) -> None:
    """The last word of a rank that can't speak for itself, written by the one that found it."""
    write(logs, Failure(rank, generation, "Hang", why, where, time.time(), EXIT_FAILED, False, str(log), ""))


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


def tell_torchrun(error: BaseException) -> None:
    """Have torchrun's own summary name the error instead of `error_file: <N/A>`."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)
