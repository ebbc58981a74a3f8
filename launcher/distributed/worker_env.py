"""The number of workers on this machine, and their environment: CPU threads and network interfaces."""

from __future__ import annotations

import os
from collections.abc import Mapping

from launcher.config.schema import RunConfig
from launcher.system.gpus import count_gpus
from launcher.system.processes import count_cores

__all__ = ["make_isolation_env", "read_user_omp_threads", "resolve_num_threads", "resolve_num_workers"]

#: Passes the user's own OMP_NUM_THREADS from the driver to its workers: torchrun sets OMP_NUM_THREADS by itself.
THREADS_ENV = "LAUNCHER_THREADS"


def read_user_omp_threads(config: RunConfig, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment for the workers with the user's own OMP_NUM_THREADS; empty if launch.threads is set."""
    value = env.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    is_open = config.launch.threads is None and not config.elastic.exact
    return {THREADS_ENV: value} if is_open and value.isdecimal() and int(value) > 0 else {}


def resolve_num_threads(config: RunConfig, workers: int, env: Mapping[str, str] = os.environ) -> int:
    """CPU threads for each of `workers` on this machine: as requested, else the cores divided by the workers.

    One thread under elastic.exact: how a sum is split among threads changes its last bits.
    """
    if config.elastic.exact:
        return 1
    requested = config.launch.threads or int(env.get(THREADS_ENV, 0))
    return requested or max(1, count_cores() // workers)


def make_isolation_env(config: RunConfig, workers: int) -> Mapping[str, str]:
    """Environment that gives each worker its share of the cores and keeps communication on the loopback."""
    user_threads = read_user_omp_threads(config)
    return {
        "OMP_NUM_THREADS": str(resolve_num_threads(config, workers, user_threads)),
        **user_threads,
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        **config.launch.env,
    }


def resolve_num_workers(config: RunConfig) -> int:
    """`launch.workers`, else one per GPU, else 1."""
    if config.launch.workers is not None:
        return config.launch.workers
    return 1 if config.train.device == "cpu" else max(1, count_gpus())
