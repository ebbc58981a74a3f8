"""Commands that the launcher itself calls: in its workers, its measuring processes and its Slurm job scripts."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from launcher.cli.arguments import resolve_config
from launcher.errors import EXIT_OK, UsageError
from launcher.topology import Topology, count_slurm_restarts, get_slurm_job_id

__all__ = ["run_again", "run_folder", "run_probe", "run_store", "run_worker"]


def run_worker(args: Sequence[str]) -> int:
    """Run a worker started by the driver, configured by the given handover file."""
    topology = Topology.from_env()
    if topology is None or len(args) != 1:
        raise UsageError("worker is started by the driver only: type launcher, or torchrun -m launcher")
    from launcher.launch import worker

    return int(worker.main_handover(args[0], topology))


def run_probe(args: Sequence[str]) -> int:
    """Run a measurement, either for the driver (with a worker count) or beside a worker (with a rank)."""
    from launcher.distributed.commands import NPROC_FLAG
    from launcher.tune.processes import fork_server, probe_process

    if Topology.from_env() is not None and len(args) == 1:
        return probe_process.main(args[0])
    if len(args) != 2 or not args[0].startswith(NPROC_FLAG):
        raise UsageError("probe is started by the launcher only: type launcher tune")
    return fork_server.main(args[1], int(args[0].removeprefix(NPROC_FLAG)))


def run_folder(args: Sequence[str]) -> int:
    """Print the run directory, for a Slurm job script."""
    from launcher.slurm import submit

    print(submit.create_job_directory(resolve_config(args), get_slurm_job_id(), restarted=count_slurm_restarts() > 0))
    return EXIT_OK


def run_again(args: Sequence[str]) -> int:
    """Report whether a failed Slurm job should be requeued, for its script."""
    from launcher.slurm import submit

    return int(submit.compute_requeue_status(args[0], get_slurm_job_id()))


def run_store(args: Sequence[str]) -> int:
    """Serve the rendezvous of a pool, or with one argument print its endpoint, for the script of a pool task.

    A node that requests the endpoint is also registered as waiting to join.
    """
    from launcher.distributed import join_gate
    from launcher.run_dir.run_directory import RunDirectory
    from launcher.slurm import rendezvous_service

    run_dir = Path(args[0])
    if len(args) == 1:
        endpoint = rendezvous_service.wait_for_endpoint(run_dir)
        join_gate.wait_to_join(RunDirectory(run_dir), f"{socket.gethostname()}-{os.getpid()}")
        print(endpoint)
    else:
        rendezvous_service.serve_store(run_dir, args[1])
    return EXIT_OK
