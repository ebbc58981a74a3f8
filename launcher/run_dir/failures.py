"""Failure records: a failing rank writes one, and the driver prints the decisive one last."""

from __future__ import annotations

import json
import os
import re
import signal
import sysconfig
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.errors import EXIT_FAILED, EXIT_USAGE, UsageError, format_named_error
from launcher.system.atomic_files import atomic_write_text
from launcher.system.jsonl import JsonlReader
from launcher.system.redaction import mask_secrets
from launcher.telemetry.records import Event

__all__ = [
    "RankFailure",
    "describe_error",
    "describe_exit",
    "describe_exit_codes",
    "first_failure",
    "is_logged",
    "is_peer_failure",
    "is_user_code",
    "read_failures",
    "record_for_torchelastic",
    "root_cause",
    "shorten_path",
    "should_report",
    "write_failure",
    "write_hang_failure",
]

ROOT_CAUSE_WAIT_S = 0.4
PACKAGE_DIR = Path(__file__).parents[1]  # frames below it are the launcher's own code
STDLIB_DIR = f"{sysconfig.get_path('stdlib')}/"
ADDRESSES_AND_NUMBERS = re.compile(r"0x[0-9a-fA-F]+|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
HANG = "Hang"
#: Errors of torch, gloo and NCCL on a rank that lost a peer: always a consequence of another failure, never the root
#: cause. Errors of the network that have another cause ("Duplicate GPU detected", "no socket interface found") and a
#: recipe's own ("[Errno 104] Connection reset by peer") do not match.
PEER_FAILURE_PATTERN = re.compile(
    "|".join(
        (
            r"Connection closed by peer",  # gloo
            r"(?:Read error|writev) \[.*?\S: (?:Connection reset by peer|Broken pipe|Connection timed out)",
            r"(?:Read|Write|Connect) timeout \[",
            r"Socket (?:unexpectedly )?closed \[",
            r"timed out connecting: ",
            r"Timed out waiting \d+ms for (?:recv|send) operation",
            r"Application timeout caused pair closure",
            r"^(?:Broken pipe|Connection reset by peer)\b",  # the store
            r"Connection was likely closed",  # a store whose rank 0 was killed
            r"\w+ failed on SocketImpl.*: (?:Broken pipe|Connection reset by peer)",
            r"ncclRemoteError|remote process exited or there was a network error",  # NCCL
            r"NCCL communicator was aborted",
            r"ollective operation timeout: WorkNCCL|WorkNCCL\(.*\) timed out",
            r"retrieving ncclUniqueId from .* got error",
            r"nccl\w+Error: .*(?:failed : (?:Connection (?:refused|reset by peer|timed out)|Broken pipe)"
            r"|closed by remote peer|completion from peer)",
        )
    )
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
            message=mask_secrets(" ".join(describe_error(error).split())),
            where="" if is_usage else find_user_frame(error),
            time=time.time(),
            status=EXIT_USAGE if is_usage else EXIT_FAILED,
            is_fatal=is_usage or final,
            log=str(log),
            traceback=mask_secrets("".join(traceback.format_exception(error))),
        )

    @property
    def signature(self) -> tuple[str, str, str]:
        """Equal for two failures of one kind at one place: the message's numbers and addresses do not count."""
        return self.type, self.where, ADDRESSES_AND_NUMBERS.sub("#", self.message)

    def to_event(self) -> Event:
        names = ("rank", "generation", "type", "message", "where", "log")
        return Event(self.time, "error", {name: getattr(self, name) for name in names})

    def summary(self) -> str:
        if self.status == EXIT_USAGE:
            return self.message
        at = f" in {self.where}" if self.where else ""
        return f"rank {self.rank} failed{at}: {format_named_error(self.type, self.message)} (log: {self.log})"


def write_failure(
    logs: Path,
    rank: int,
    generation: int,
    error: BaseException,
    log: Path,
    *,
    final: bool = False,
    unwritten: str | None = None,
) -> RankFailure:
    """Write `error-g<generation>-r<rank>.json` beside the logs; if the disk is full, append it to `unwritten`."""
    failure = RankFailure.from_exception(rank, generation, error, log, final=final)
    try:
        write_failure_json(logs, failure)
    except OSError:
        with suppress(OSError), open(unwritten or os.devnull, "a") as file:
            file.write(json.dumps(asdict(failure)) + "\n")
    return failure


def write_hang_failure(logs: Path, rank: int, generation: int, where: str, message: str, log: Path) -> None:
    """Write the failure of a rank that hangs; called by the rank that detected the hang."""
    write_failure_json(
        logs, RankFailure(rank, generation, HANG, message, where, time.time(), EXIT_FAILED, False, str(log), "")
    )


def write_failure_json(logs: Path, failure: RankFailure) -> None:
    atomic_write_text(logs / f"error-g{failure.generation}-r{failure.rank}.json", json.dumps(asdict(failure)))


def describe_error(error: BaseException) -> str:
    """The error's message; for `sys.exit` its text, or the call itself if it has only a status."""
    if not isinstance(error, SystemExit):
        return str(error)
    return error.code if isinstance(error.code, str) else f"the recipe called sys.exit({error.code})"


def find_user_frame(error: BaseException) -> str:
    """Return file:line of the innermost frame in the user's code, or of the innermost frame if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    user_frames = [frame for frame in frames if is_user_code(frame.filename)]
    chosen = (user_frames or list(frames))[-1:]
    return f"{shorten_path(chosen[0].filename)}:{chosen[0].lineno}" if chosen else ""


def is_user_code(filename: str) -> bool:
    """Whether a source file is neither the launcher's nor an installed package's nor Python's own."""
    own = f"{PACKAGE_DIR}/" in filename or filename.startswith((STDLIB_DIR, "<frozen "))
    return not own and "site-packages" not in filename


def shorten_path(name: str) -> str:
    try:
        return str(Path(name).relative_to(Path.cwd()))
    except ValueError:
        return name


def first_failure(logs: Path, since: int, unwritten: Path | None = None) -> RankFailure | None:
    """Return the first root cause since generation `since`, or the first peer failure if that is all there is.

    `unwritten` holds the failures that could not be written to `logs`, one per line.
    """
    failures = [failure for failure in read_failures(logs) if failure.generation >= since]
    for line in unwritten.read_text().splitlines() if unwritten is not None else ():
        with suppress(ValueError, TypeError):  # the line is still being written
            failures.append(RankFailure(**json.loads(line)))
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
        if path.is_symlink():
            continue
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
    return PEER_FAILURE_PATTERN.search(message) is not None


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
