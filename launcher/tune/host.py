"""The one process that the driver starts to measure: it imports torch once, and has a copy of itself for every rank.

It knows nothing of the recipe and asks no device, so that every copy is as good as a process that was started. It
serves their store on the loopback, starts all of them again after memory ran out, and writes down what it came to.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from traceback import format_exc
from typing import TYPE_CHECKING, Any

from launcher.durable import write_whole
from launcher.errors import EXIT_OK, RequestError
from launcher.process import die_with_parent
from launcher.topology import as_rank
from launcher.tune.auto import Unmeasured
from launcher.tune.errand import Errand, Sent, sent
from launcher.tune.rounds import Word, in_rounds

if TYPE_CHECKING:
    from torch.distributed import TCPStore

__all__ = ["OUTCOME", "main"]

LOOK_EVERY_S = 0.02
OUTCOME = "outcome.json"


def main(path: str, workers: int) -> int:
    """Measure with so many ranks what the file at `path` asks for, and leave what came of it in the folder it names."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the driver hears of these, and ends us where it has to
    facts = json.loads(Path(path).read_text())
    private = Path(facts["private"])
    write_whole(private / OUTCOME, json.dumps(outcome(facts["run"], workers, private, facts["look"])))
    return EXIT_OK


def outcome(run: Mapping[str, Any], workers: int, private: Path, look: bool) -> dict[str, Any]:
    """The document as `found`; or why there is none, as `request` or `unmeasured`."""
    try:
        return {"found": measured(run, workers, private, look)}
    except RequestError as error:
        return {"request": str(error)}
    except Unmeasured as error:
        return {"unmeasured": str(error), "trace": error.trace}
    except Exception as error:  # no process could be forked, torch does not import
        return {"unmeasured": f"{type(error).__name__}: {error}", "trace": format_exc()}


def measured(run: Mapping[str, Any], workers: int, private: Path, look: bool) -> dict[str, Any]:
    """
    Raises:
        RequestError, Unmeasured: as `in_rounds`.
    """
    import torch

    import launcher.tune.session  # noqa: F401  here, and in none of the copies
    from launcher.rendezvous import loopback_store

    torch.set_num_threads(1)  # each copy sets its own; here nothing is computed
    store = loopback_store(0, serve=True)

    def start(number: int, earlier: Mapping[str, Any] | None) -> list[Word]:
        folders = [private / f"{number}-{rank}" for rank in range(workers)]
        for folder in folders:
            folder.mkdir(0o700)
        errands = [Errand(run, look, number, str(number), str(folder), earlier) for folder in folders]
        return [Word.of(folder, status) for folder, status in zip(folders, ended(errands, store), strict=True)]

    return in_rounds(start)


def ended(errands: Sequence[Errand], store: TCPStore) -> list[int | None]:
    """The exit status of every rank, once all have ended well or one has not; None for those that were ended then."""
    ranks: list[Sent] = []
    try:
        for rank, errand in enumerate(errands):
            ranks.append(sent(errand, as_rank(rank, len(errands), store.port)))
        while not over([one.poll() for one in ranks]):
            time.sleep(LOOK_EVERY_S)
        return [one.poll() for one in ranks]  # once more: the cause may have been looked at before it ended
    finally:
        for one in ranks:
            one.kill()
        for one in ranks:
            one.wait()


def over(statuses: Sequence[int | None]) -> bool:
    return all(status == EXIT_OK for status in statuses) or any(status not in (None, EXIT_OK) for status in statuses)
