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

from launcher.distributed.cleanup_process import private_temp_dir
from launcher.distributed.store_gather import StoreGather
from launcher.errors import EXIT_OK
from launcher.topology import USE_AGENT_STORE_ENV, Topology
from launcher.tune.processes.probe_process import ProbeTask, start_probe
from launcher.tune.processes.retries import RankResult, run_with_retries

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["measure_in_sidecars"]

SIDECAR_POLL_INTERVAL_S = 0.05


def measure_in_sidecars(config: Mapping[str, Any], token: str, topology: Topology, store: dist.Store) -> dict[str, Any]:
    """Measure in one process per rank and return the resulting document, the same on all ranks. Every rank calls it.

    `config` is the configuration as nested JSON values, and `token` is unique to this measurement.

    Raises:
        UsageError: any rank found the request to be wrong.
        MeasurementError: a process was killed, or failed for a reason other than memory.
    """
    import launcher.tune.session  # noqa: F401  training needs it too, and forked processes inherit the import

    store_gather = StoreGather(store, topology.rank, topology.world)

    def start(attempt: int, earlier: Mapping[str, Any] | None) -> list[RankResult]:
        with tempfile.TemporaryDirectory(prefix="measure-", dir=private_temp_dir()) as private:
            prefix = f"{token}/{attempt}"
            task = ProbeTask(config, True, attempt, prefix, private, earlier)
            own = RankResult.from_process(Path(private), wait_for_rank(task, store, topology.rank))
        return [RankResult.from_facts(facts) for facts in store_gather.gather(own.to_facts())]

    return run_with_retries(start)


def wait_for_rank(task: ProbeTask, store: dist.Store, rank: int) -> int | None:
    """The exit status of this rank's process; None if it was killed because another rank's process failed."""
    failed = f"{task.prefix}/failed"
    process = start_probe(task, USE_AGENT_STORE_ENV)
    try:
        while (status := process.poll()) is None:
            if store.check([failed]):
                return process.poll()  # it may have ended in the meantime and be the cause
            time.sleep(SIDECAR_POLL_INTERVAL_S)
        if status != EXIT_OK:
            store.set(failed, str(rank))
        return status
    finally:
        process.kill()
        process.wait()
