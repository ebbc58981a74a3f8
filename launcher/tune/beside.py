"""Measuring under a torchrun of the user's own: each worker has a process beside it do so, and waits.

What measuring does to a process (memory, libraries' state, process groups) ends with that process, and one that runs
out of memory while others wait for it ends nobody's job. The processes meet through a part of the job's store.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import EXIT_OK
from launcher.topology import AS_GUEST, Topology
from launcher.tune.council import Council
from launcher.tune.errand import Errand, sent
from launcher.tune.rounds import Word, in_rounds

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["measured"]

LOOK_EVERY_S = 0.05


def measured(question: Mapping[str, Any], topology: Topology, store: dist.Store) -> dict[str, Any]:
    """The document that the ranks' processes come to, the same on all. Every rank calls it.

    Raises:
        RequestError: the request is wrong, found by any rank.
        Unmeasured: a process failed for another reason than memory, or was killed.
    """
    import launcher.tune.session  # noqa: F401  what training needs too, and a process forked from here need not import

    council = Council(store, topology.rank, topology.world)

    def start(number: int, earlier: Mapping[str, Any] | None) -> list[Word]:
        with tempfile.TemporaryDirectory(prefix="launcher-auto-") as private:
            prefix = f"{question['token']}/{number}"
            errand = Errand(question["question"], True, number, prefix, private, earlier)
            own = Word.of(Path(private), ended(errand, store, topology.rank))
        return [Word.from_facts(facts) for facts in council.gather(own.to_facts())]

    return in_rounds(start)


def ended(errand: Errand, store: dist.Store, rank: int) -> int | None:
    """The exit status of this rank's process; None where another rank's has failed, and this one was ended."""
    failed = f"{errand.prefix}/failed"
    process = sent(errand, AS_GUEST)
    try:
        while (status := process.poll()) is None:
            if store.check([failed]):
                return process.poll()  # it may have ended meanwhile, and be the cause
            time.sleep(LOOK_EVERY_S)
        if status != EXIT_OK:
            store.set(failed, str(rank))
        return status
    finally:
        process.kill()
        process.wait()
