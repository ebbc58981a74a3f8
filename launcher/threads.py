"""How many CPU threads a rank computes with."""

from __future__ import annotations

import os
from collections.abc import Mapping

from launcher.settings import Run

__all__ = ["asked_threads", "threads_of"]

#: The driver's word to the workers that it starts. Their OMP_NUM_THREADS says nothing: torchrun sets one by itself.
ASKED = "LAUNCHER_THREADS"


def asked_threads(run: Run, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """For the workers' environment: the user's own OMP_NUM_THREADS, where launch.threads leaves it open."""
    value = env.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    open_to_it = run.launch.threads is None and not run.elastic.exact
    return {ASKED: value} if open_to_it and value.isdecimal() and int(value) > 0 else {}


def threads_of(run: Run, workers: int, env: Mapping[str, str] = os.environ) -> int:
    """CPU threads of each of `workers` on this machine: what was asked for, else its cores divided among them.

    One under elastic.exact: how a sum is divided among threads decides its last bits.
    """
    if run.elastic.exact:
        return 1
    asked = run.launch.threads or int(env.get(ASKED, 0))
    return asked or max(1, len(os.sched_getaffinity(0)) // workers)
