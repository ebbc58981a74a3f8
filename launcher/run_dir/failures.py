"""Failure records: a failing rank writes one, and the driver prints the decisive one last."""

from __future__ import annotations

import json
import signal
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.errors import EXIT_FAILED, EXIT_USAGE, UsageError
from launcher.system.atomic_files import atomic_write_text
from launcher.system.jsonl import JsonlReader
from launcher.system.redaction import mask_secrets
from launcher.telemetry.records import Event

__all__ = [
    "RankFailure",
    "describe_exit",
    "describe_exit_codes",
    "first_failure",
    "is_logged",
    "is_peer_failure",
    "read_failures",
    "record_for_torchelastic",
    "root_cause",
    "should_report",
    "write_failure",
    "write_hang_failure",
]

ROOT_CAUSE_WAIT_S = 0.4
PACKAGE_DIR = Path(__file__).parents[1]  # frames below it are the launcher's own code
HANG = "Hang"
#: Error texts of a rank that lost a peer: always a consequence of another failure, never the root cause.
PEER_FAILURE_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",  # a TCPStore whose rank 0 was killed
    "Broken pipe",
    "NCCL",
    "Timed out waiting",
    "gloo",
)


@dataclass(frozen=True)
class RankFailure:
    """The failure of one rank. `is_fatal`: restarting the workers would fail in the same way."""

    rank: int
    generation: int
    type: str
    message: str
    where: str
    time: float
    status: int
    is_fatal: bool
    log: str
    traceback: str

    @classmethod
    def from_exception(
        cls, rank: int, generation: int, error: BaseException, log: Path, *, final: bool = False
    ) -> RankFailure:
        """Build the record of `error`, with secrets masked in the message and the traceback."""
        is_usage = isinstance(error, UsageError)
        return cls(
            rank=rank,
            generation=generation,
            type=type(error).__name__,
            message=mask_secrets(" ".join(str(error).split())),
            where="" if is_usage else find_user_frame(error),
            time=time.time(),
            status=EXIT_USAGE if is_usage else EXIT_FAILED,
            is_fatal=is_usage or final,
            log=str(log),
            traceback=mask_secrets("".join(traceback.format_exception(error))),
        )

    def to_event(self) -> Event:
        names = ("rank", "generation", "type", "message", "where", "log")
        return Event(self.time, "error", {name: getattr(self, name) for name in names})

    def summary(self) -> str:
        if self.status == EXIT_USAGE:
            return self.message
        at = f" in {self.where}" if self.where else ""
        return f"rank {self.rank} failed{at}: {self.type}: {self.message} (log: {self.log})"


def write_failure(
    logs: Path, rank: int, generation: int, error: BaseException, log: Path, *, final: bool = False
) -> RankFailure:
    """Write `error-g<generation>-r<rank>.json` beside the logs."""
    failure = RankFailure.from_exception(rank, generation, error, log, final=final)
    write_failure_json(logs, failure)
    return failure


def write_hang_failure(logs: Path, rank: int, generation: int, where: str, message: str, log: Path) -> None:
    """Write the failure of a rank that hangs; called by the rank that detected the hang."""
    write_failure_json(
        logs, RankFailure(rank, generation, HANG, message, where, time.time(), EXIT_FAILED, False, str(log), "")
    )


def write_failure_json(logs: Path, failure: RankFailure) -> None:
    atomic_write_text(logs / f"error-g{failure.generation}-r{failure.rank}.json", json.dumps(asdict(failure)))


def find_user_frame(error: BaseException) -> str:
    """Return file:line of the innermost frame in the user's code, or of the innermost frame if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    user_frames = [f for f in frames if "site-packages" not in f.filename and f"{PACKAGE_DIR}/" not in f.filename]
    chosen = (user_frames or list(frames))[-1:]
    return f"{shorten_path(chosen[0].filename)}:{chosen[0].lineno}" if chosen else ""


def shorten_path(name: str) -> str:
    try:
        return str(Path(name).relative_to(Path.cwd()))
    except ValueError:
        return name


def first_failure(logs: Path, since: int) -> RankFailure | None:
    """Return the first root cause since generation `since`, or the first peer failure if that is all there is."""
    failures = [failure for failure in read_failures(logs) if failure.generation >= since]
    return min(failures, key=lambda f: (is_peer_failure(f.message), f.generation, f.time), default=None)


def root_cause(logs: Path, generation: int) -> RankFailure | None:
    """Return the first root cause in one generation; None if no rank recorded one."""
    causes = [failure for failure in read_failures(logs, generation) if not is_peer_failure(failure.message)]
    return min(causes, key=lambda failure: failure.time, default=None)


def is_logged(events: Path, failure: RankFailure) -> bool:
    """Whether the failure is already in the event log; a hang is always logged by the rank that detected it."""
    logged = ("error", failure.rank, failure.generation)
    return failure.type == HANG or any(
        (event.get("event"), event.get("rank"), event.get("generation")) == logged for event in JsonlReader(events)
    )


def read_failures(logs: Path, generation: int | None = None) -> list[RankFailure]:
    """Return the failures recorded so far, in one generation or in all of them."""
    failures = []
    for path in logs.glob(f"error-g{'*' if generation is None else generation}-r*.json"):
        with suppress(OSError, ValueError, TypeError):  # the file is still being written
            failures.append(RankFailure(**json.loads(path.read_text())))
    return failures


def should_report(logs: Path, failure: RankFailure, within_s: float = ROOT_CAUSE_WAIT_S) -> bool:
    """Whether this rank should report to the user: the lowest rank whose failure is not a peer failure.

    Rank 0 reports its own error at once; the other ranks first wait for records of lower ranks. A rank with a peer
    failure waits twice as long, because torchrun terminates the waiting ranks as soon as it exits.
    """
    lost_peer = is_peer_failure(failure.message)
    if failure.rank == 0 and not lost_peer:
        return True
    time.sleep(2 * within_s if lost_peer else within_s)
    failures = (failure, *read_failures(logs, failure.generation))
    return min(failures, key=lambda f: (is_peer_failure(f.message), f.rank)).rank == failure.rank


def is_peer_failure(message: str) -> bool:
    """Whether an error message only reports the loss of another rank."""
    return any(sign in message for sign in PEER_FAILURE_SIGNS)


def describe_exit_codes(codes: Mapping[int, int]) -> str:
    """Describe the decisive exit code of ranks that wrote no failure record; empty if there are no codes."""
    decisive_first = sorted(codes.items(), key=lambda item: item[1] == -signal.SIGTERM)
    return next((describe_exit(f"rank {rank}", code) for rank, code in decisive_first), "")


def describe_exit(process: str, code: int) -> str:
    """Describe how a process ended; a negative `code` is the number of the signal that killed it."""
    if code == -signal.SIGKILL:
        return f"{process} was killed by SIGKILL: out of memory?"
    return f"{process} was killed by {signal.Signals(-code).name}" if code < 0 else f"{process} exited with code {code}"


def record_for_torchelastic(error: BaseException) -> None:
    """Record the error so that torchrun's summary shows it instead of `error_file: <N/A>`."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)
