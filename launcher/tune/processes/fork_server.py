"""The process that the driver starts to measure: it imports torch once and forks itself for every rank.

It does not import the recipe or query devices, so every fork behaves like a new process. It serves the ranks' store on
the loopback interface, restarts all ranks after running out of memory, and writes the result.
"""

from __future__ import annotations

import json
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from traceback import format_exc
from typing import TYPE_CHECKING, Any

from launcher.distributed.cleanup_process import CleanupProcess, private_temp_dir
from launcher.errors import EXIT_OK, UsageError, format_named_error
from launcher.goodput.auto_batch import MeasurementError
from launcher.system.processes import die_with_parent
from launcher.topology import torchrun_env
from launcher.tune.processes.probe_process import ProbeTask, ProcessHandle, start_probe
from launcher.tune.processes.retries import RankResult, run_with_retries

if TYPE_CHECKING:
    from torch.distributed import TCPStore

__all__ = ["main"]

RANK_POLL_INTERVAL_S = 0.02


def main(path: str, workers: int) -> int:
    """Run the request in the file at `path` with `workers` ranks; write the result to the file that it names."""
    die_with_parent()
    CleanupProcess.start()
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)  # the driver handles these and kills this process if needed
    request = json.loads(Path(path).read_text())
    with tempfile.TemporaryDirectory(prefix="measure-", dir=private_temp_dir()) as private:
        outcome = run_and_report(request["config"], workers, Path(private), request["use_cache"])
    Path(request["outcome"]).write_text(json.dumps(outcome))
    return EXIT_OK


def run_and_report(config: Mapping[str, Any], workers: int, private: Path, use_cache: bool) -> dict[str, Any]:
    """The `document`, or the message of a `usage_error` or `measurement_error`."""
    try:
        return {"document": measure_in_forks(config, workers, private, use_cache)}
    except UsageError as error:
        return {"usage_error": str(error)}
    except MeasurementError as error:
        return {"measurement_error": str(error), "trace": error.trace}
    except Exception as error:  # e.g. fork failed, or torch cannot be imported
        return {"measurement_error": format_named_error(type(error).__name__, str(error)), "trace": format_exc()}


def measure_in_forks(config: Mapping[str, Any], workers: int, private: Path, use_cache: bool) -> dict[str, Any]:
    """Measure with one forked process per rank and return the document.

    Raises:
        UsageError, MeasurementError: as `run_with_retries`.
    """
    import torch

    import launcher.tune.session  # noqa: F401  imported once here, inherited by the forks
    from launcher.distributed.rendezvous import make_loopback_store

    torch.set_num_threads(1)  # each fork sets its own; nothing is computed here
    store = make_loopback_store(0, serve=True)

    def start(attempt: int, earlier: Mapping[str, Any] | None) -> list[RankResult]:
        folders = [private / f"{attempt}-{rank}" for rank in range(workers)]
        for folder in folders:
            folder.mkdir(0o700)
        tasks = [ProbeTask(config, use_cache, attempt, str(attempt), str(folder), earlier) for folder in folders]
        return [
            RankResult.from_process(folder, status)
            for folder, status in zip(folders, wait_for_ranks(tasks, store), strict=True)
        ]

    return run_with_retries(start)


def wait_for_ranks(tasks: Sequence[ProbeTask], store: TCPStore) -> list[int | None]:
    """Wait until all ranks succeeded or one failed; return the exit statuses, None for ranks that were killed then."""
    processes: list[ProcessHandle] = []
    try:
        for rank, task in enumerate(tasks):
            processes.append(start_probe(task, torchrun_env(rank, len(tasks), store.port)))
        while not all_done_or_failed([process.poll() for process in processes]):
            time.sleep(RANK_POLL_INTERVAL_S)
        # poll again: the failing rank may have ended after its first poll
        return [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def all_done_or_failed(statuses: Sequence[int | None]) -> bool:
    return all(status == EXIT_OK for status in statuses) or any(status not in (None, EXIT_OK) for status in statuses)
