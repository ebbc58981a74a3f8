"""Measuring under the user's own torchrun: each worker starts one measuring process and waits for it.

The side effects of measuring (memory, library state, process groups) end with that process, and running out of memory
in a collective does not end the job. The measuring processes connect through a prefix of the job's store.
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
    """Measure in one process per rank and return the resulting document, the same on all ranks. Every rank calls it.

    Raises:
        RequestError: any rank found the request to be wrong.
        Unmeasured: a process was killed, or failed for a reason other than memory.
    """
    import launcher.tune.session  # noqa: F401  training needs it too, and forked processes inherit the import

    council = Council(store, topology.rank, topology.world)

    def start(number: int, earlier: Mapping[str, Any] | None) -> list[Word]:
        with tempfile.TemporaryDirectory(prefix="launcher-auto-") as private:
            prefix = f"{question['token']}/{number}"
            errand = Errand(question["question"], True, number, prefix, private, earlier)
            own = Word.of(Path(private), ended(errand, store, topology.rank))
        return [Word.from_facts(facts) for facts in council.gather(own.to_facts())]

    return in_rounds(start)


def ended(errand: Errand, store: dist.Store, rank: int) -> int | None:
    """The exit status of this rank's process; None if it was killed because another rank's process failed."""
    failed = f"{errand.prefix}/failed"
    process = sent(errand, AS_GUEST)
    try:
        while (status := process.poll()) is None:
            if store.check([failed]):
                return process.poll()  # it may have ended in the meantime and be the cause
            time.sleep(LOOK_EVERY_S)
        if status != EXIT_OK:
            store.set(failed, str(rank))
        return status
    finally:
        process.kill()
        process.wait()
