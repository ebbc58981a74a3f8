"""The process that the driver starts to measure: it imports torch once and forks itself for every rank.

It does not import the recipe or query devices, so every fork behaves like a new process. It serves the ranks' store on
the loopback interface, restarts all ranks after running out of memory, and writes the result.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from traceback import format_exc
from typing import TYPE_CHECKING, Any

from launcher.errors import EXIT_OK, UsageError
from launcher.goodput.auto_batch import MeasurementError
from launcher.system.atomic_files import atomic_write_text
from launcher.system.processes import die_with_parent
from launcher.topology import torchrun_env
from launcher.tune.processes.probe_process import ProbeTask, ProcessHandle, start_probe
from launcher.tune.processes.retries import RankResult, run_with_retries

if TYPE_CHECKING:
    from torch.distributed import TCPStore

__all__ = ["OUTCOME_FILE", "main"]

RANK_POLL_INTERVAL_S = 0.02
OUTCOME_FILE = "outcome.json"


def main(path: str, workers: int) -> int:
    """Run the request in the file at `path` with `workers` ranks; write the result into the folder the file names."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the driver handles these and kills this process if needed
    facts = json.loads(Path(path).read_text())
    private = Path(facts["private"])
    atomic_write_text(private / OUTCOME_FILE, json.dumps(run_and_report(facts["run"], workers, private, facts["look"])))
    return EXIT_OK


def run_and_report(run: Mapping[str, Any], workers: int, private: Path, look: bool) -> dict[str, Any]:
    """The document under `found`, or the error message under `request` or `unmeasured`."""
    try:
        return {"found": measure_in_forks(run, workers, private, look)}
    except UsageError as error:
        return {"request": str(error)}
    except MeasurementError as error:
        return {"unmeasured": str(error), "trace": error.trace}
    except Exception as error:  # e.g. fork failed, or torch cannot be imported
        return {"unmeasured": f"{type(error).__name__}: {error}", "trace": format_exc()}


def measure_in_forks(run: Mapping[str, Any], workers: int, private: Path, look: bool) -> dict[str, Any]:
    """Measure with one forked process per rank and return the document.

    Raises:
        RequestError, Unmeasured: as `in_rounds`.
    """
    import torch

    import launcher.tune.session  # noqa: F401  imported once here, inherited by the forks
    from launcher.distributed.rendezvous import make_loopback_store

    torch.set_num_threads(1)  # each fork sets its own; nothing is computed here
    store = make_loopback_store(0, serve=True)

    def start(number: int, earlier: Mapping[str, Any] | None) -> list[RankResult]:
        folders = [private / f"{number}-{rank}" for rank in range(workers)]
        for folder in folders:
            folder.mkdir(0o700)
        errands = [ProbeTask(run, look, number, str(number), str(folder), earlier) for folder in folders]
        return [
            RankResult.from_process(folder, status)
            for folder, status in zip(folders, wait_for_ranks(errands, store), strict=True)
        ]

    return run_with_retries(start)


def wait_for_ranks(errands: Sequence[ProbeTask], store: TCPStore) -> list[int | None]:
    """Wait until all ranks succeeded or one failed; return the exit statuses, None for ranks that were killed then."""
    ranks: list[ProcessHandle] = []
    try:
        for rank, task in enumerate(errands):
            ranks.append(start_probe(task, torchrun_env(rank, len(errands), store.port)))
        while not all_done_or_failed([one.poll() for one in ranks]):
            time.sleep(RANK_POLL_INTERVAL_S)
        return [one.poll() for one in ranks]  # poll again: the failing rank may have ended after its first poll
    finally:
        for one in ranks:
            one.kill()
        for one in ranks:
            one.wait()


def all_done_or_failed(statuses: Sequence[int | None]) -> bool:
    return all(status == EXIT_OK for status in statuses) or any(status not in (None, EXIT_OK) for status in statuses)
