"""`launcher` and `launcher train`: train a run as driver, as a rank of torchrun, as a Slurm job, or as a sweep."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.cli.arguments import add_current_folder_to_path, handle_info_flags, resolve_config
from launcher.cli.copies import refuse_copies
from launcher.config.cli_args import HydraArgs
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_OK, UsageError
from launcher.topology import Topology

if TYPE_CHECKING:
    from launcher.launch.waiting_agent import WaitingAgent

__all__ = ["launch_or_submit", "run_train"]


def run_train(args: Sequence[str]) -> int:
    """Train one run, or with -m several; under torchrun, act as this rank's worker."""
    flags, topology = HydraArgs.parse(args), Topology.from_env()
    if handle_info_flags(flags, args):
        return EXIT_OK
    refuse_copies(topology, shards=flags.shard[1])
    if topology is not None:
        return run_as_rank(args, flags.multirun, topology)
    if not flags.multirun:
        from launcher.launch.waiting_agent import waiting_agent

        with waiting_agent(flags.overrides) as agent:
            return launch_or_submit(resolve_config(args), args, agent)
    from launcher.sweep import run_sweep

    return run_sweep.run_sweep(args, launch_or_submit)


def run_as_rank(args: Sequence[str], multirun: bool, topology: Topology) -> int:
    if multirun:
        raise UsageError(f"-m does not work in torchrun: type launcher {' '.join(args)} without torchrun")
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("a worker of torchrun receives signals: call launcher.run in its main thread")
    from launcher.launch import worker

    return int(worker.main(list(args), topology))


def launch_or_submit(config: RunConfig, overrides: Sequence[str], agent: WaitingAgent | None = None) -> int:
    """Drive one run: start torchrun and wait for it, or submit a Slurm job with these overrides."""
    if agent is not None:
        agent.discard_unless_needed(config)
    add_current_folder_to_path()  # this may not be the process that parsed the command line
    if config.launch.kind == "slurm":
        from launcher.slurm import submit

        return int(submit.submit_run(config, overrides))
    from launcher.launch import driver

    return int(driver.launch_job(config, agent))
