"""Failure records: a failing rank writes one, and the driver prints the decisive one last."""

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
#: Error texts of a rank that lost a peer: always a consequence of another failure, never the root cause.
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
    """The failure of one rank. `final`: restarting the workers would fail in the same way."""

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
        """Build the record of `error`, with secrets masked in the message and the traceback."""
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
    """Write the failure of a rank that hangs; called by the rank that detected the hang."""
    write(logs, Failure(rank, generation, HANG, why, where, time.time(), EXIT_FAILED, False, str(log), ""))


def write(logs: Path, failure: Failure) -> None:
    write_whole(logs / f"error-g{failure.generation}-r{failure.rank}.json", json.dumps(asdict(failure)))


def where(error: BaseException) -> str:
    """Return file:line of the innermost frame in the user's code, or of the innermost frame if there is none."""
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
    """Return the first root cause since generation `since`, or the first peer failure if that is all there is."""
    found = [failure for failure in those(logs) if failure.generation >= since]
    return min(found, key=lambda f: (consequence(f.message), f.generation, f.time), default=None)


def cause(logs: Path, generation: int) -> Failure | None:
    """Return the first root cause in one generation; None if no rank recorded one."""
    own = [failure for failure in those(logs, generation) if not consequence(failure.message)]
    return min(own, key=lambda failure: failure.time, default=None)


def written(events: Path, found: Failure) -> bool:
    """Whether the failure is already in the event log; a hang is always logged by the rank that detected it."""
    return found.type == HANG or any(
        line.get("event") == "error" and (line.get("rank"), line.get("generation")) == (found.rank, found.generation)
        for line in whole_lines(events)
    )


def whole_lines(events: Path) -> Iterator[dict[str, Any]]:
    for line in events.read_text(errors="replace").split("\n") if events.exists() else []:
        with suppress(ValueError):  # a line truncated by a kill
            yield json.loads(line)


def those(logs: Path, generation: int | None = None) -> list[Failure]:
    """Return the failures recorded so far, in one generation or in all of them."""
    found = []
    for path in logs.glob(f"error-g{'*' if generation is None else generation}-r*.json"):
        with suppress(OSError, ValueError, TypeError):  # the file is still being written
            found.append(Failure(**json.loads(path.read_text())))
    return found


def speaks(logs: Path, own: Failure, within_s: float = SPEAK_WITHIN_S) -> bool:
    """Whether this rank should report to the user: the lowest rank whose failure is not a peer failure.

    Rank 0 reports its own error at once; the other ranks first wait for records of lower ranks. A rank with a peer
    failure waits twice as long, because torchrun terminates the waiting ranks as soon as it exits.
    """
    if own.rank == 0 and not consequence(own.message):
        return True
    time.sleep(2 * within_s if consequence(own.message) else within_s)
    chosen = min((own, *those(logs, own.generation)), key=lambda f: (consequence(f.message), f.rank))
    return chosen.rank == own.rank


def consequence(message: str) -> bool:
    """Whether an error message only reports the loss of another rank."""
    return any(word in message for word in CONSEQUENCES)


def departed(codes: Mapping[int, int]) -> str:
    """Describe the decisive exit code of ranks that wrote no failure record; empty if there are no codes."""
    told = sorted(codes.items(), key=lambda item: item[1] == -signal.SIGTERM)
    return next((left(f"rank {rank}", code) for rank, code in told), "")


def left(who: str, code: int) -> str:
    """Describe how a process ended; a negative `code` is the number of the signal that killed it."""
    if code == -signal.SIGKILL:
        return f"{who} was killed by SIGKILL: out of memory?"
    return f"{who} was killed by {signal.Signals(-code).name}" if code < 0 else f"{who} exited with code {code}"


def tell_torchrun(error: BaseException) -> None:
    """Record the error so that torchrun's summary shows it instead of `error_file: <N/A>`."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)
