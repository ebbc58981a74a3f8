"""Run measuring in attempts: one process per rank, started together and restarted after running out of memory.

If memory runs out on one rank while the others wait for it in a collective, no rank can continue. All processes end;
the next attempt receives the results so far and treats the size being measured as one that does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

from launcher.errors import EXIT_OK, EXIT_RESTART, EXIT_USAGE, UsageError, format_named_error
from launcher.goodput.auto_batch import MeasurementError
from launcher.run_dir import failures
from launcher.run_dir.failures import RankFailure
from launcher.tune.measurements import Measurement, Measurements

__all__ = [
    "EXIT_RANK_OOM",
    "RESULT_FILE",
    "STATE_FILE",
    "RankResult",
    "StartAttempt",
    "make_failure_error",
    "mark_oom",
    "run_with_retries",
]

EXIT_RANK_OOM = 76  # memory ran out on this rank while the others waited for it
MAX_ATTEMPTS = 20
RESULT_FILE, STATE_FILE = "result.json", "state.json"


@dataclass(frozen=True)
class RankResult:
    """Result of one rank's process. `status` is None if it was killed because another rank failed."""

    status: int | None
    failure: RankFailure | None = None
    result: Mapping[str, Any] | None = None
    state: Mapping[str, Any] | None = None

    @classmethod
    def from_process(cls, private: Path, status: int | None) -> RankResult:
        """Combine the exit status with the files that the process left in its folder."""
        return cls(
            status,
            failures.first_failure(private, 0),
            read_json_if_exists(private / RESULT_FILE),
            read_json_if_exists(private / STATE_FILE),
        )

    def to_facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> RankResult:
        return cls(**{**facts, "failure": facts["failure"] and RankFailure(**facts["failure"])})


#: Runs one attempt: takes its number (from 0) and the earlier results, returns every rank's result in rank order.
StartAttempt = Callable[[int, Mapping[str, Any] | None], Sequence[RankResult]]


def run_with_retries(start: StartAttempt) -> dict[str, Any]:
    """Run attempts until one succeeds, and return the document.

    Raises:
        UsageError: any rank found the request to be wrong.
        MeasurementError: a process was killed, or failed for a reason other than memory.
    """
    earlier: Mapping[str, Any] | None = None
    for attempt in range(MAX_ATTEMPTS):
        results = start(attempt, earlier)
        if all(result.status == EXIT_OK for result in results):
            return dict(results[0].result or {})
        raise_root_cause(results)
        earlier = mark_oom(results[0].state or {})
    times = f"measuring batch sizes ran out of memory {MAX_ATTEMPTS} times"
    raise MeasurementError(f"{times}: set tune.max, or type a number for batch.per_device")


def raise_root_cause(results: Sequence[RankResult]) -> None:
    """Raise the root cause of a failed attempt; return if memory ran out at a size that the next one can skip.

    A failing rank does not get others killed, but makes many of them fail: so SIGKILL takes precedence, then the first
    error that is not a consequence of another.

    Raises:
        UsageError, MeasurementError: as `run_with_retries`.
    """
    failed = {rank: result.status for rank, result in enumerate(results) if result.status not in (None, EXIT_OK)}
    errors = sorted((result.failure for result in results if result.failure is not None), key=lambda error: error.time)
    cause = next((error for error in errors if not failures.is_peer_failure(error.message)), None)
    killed = {rank: status for rank, status in failed.items() if status == -SIGKILL}
    if killed:
        raise MeasurementError(failures.describe_exit_codes(killed) + describe_tried_size(results[0].state))
    if cause is not None:
        raise make_failure_error(cause)
    if EXIT_RANK_OOM in failed.values() and results[0].state is not None:
        return
    unexplained = {rank: status for rank, status in failed.items() if status not in (EXIT_RESTART, EXIT_RANK_OOM)}
    if not unexplained and errors:
        raise make_failure_error(errors[0])
    raise MeasurementError(failures.describe_exit_codes(unexplained or failed))


def describe_tried_size(state: Mapping[str, Any] | None) -> str:
    trying = (state or {}).get("trying")
    return "" if trying is None else f" (while measuring per_device={trying})"


def make_failure_error(first: RankFailure) -> Exception:
    """The exception to raise for a worker's recorded failure."""
    if first.status == EXIT_USAGE:
        return UsageError(first.message)
    at = f" in {first.where}" if first.where else ""
    named = format_named_error(first.type, first.message)
    line = first.message if first.is_fatal else f"rank {first.rank} failed{at}: {named}"
    return MeasurementError(line, first.traceback)


def mark_oom(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state of a search; the size that was being measured, if any, is marked as out of memory."""
    measurements = Measurements.from_facts(facts["measurements"])
    if facts["trying"] is not None:
        measurements = measurements.with_measurement(Measurement(facts["trying"], where="a collective"))
    return {"measurements": measurements.to_facts(), "spent_s": facts["spent_s"]}


def read_json_if_exists(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else None
