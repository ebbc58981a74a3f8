"""How many CPU threads a rank computes with."""

from __future__ import annotations

import os

from launcher.settings import Run

__all__ = ["threads_of"]


def threads_of(run: Run, workers: int) -> int:
    """CPU threads of each of `workers` on this machine: what was asked for, else its cores divided among them.

    One under elastic.exact: how a sum is divided among threads decides its last bits.
    """
    if run.elastic.exact:
        return 1
    return run.launch.threads or max(1, len(os.sched_getaffinity(0)) // workers)
