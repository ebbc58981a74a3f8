"""`launcher tune`: measure per-device batch sizes and recommend one, with -m for each point of a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.cli.arguments import handle_info_flags, resolve_config
from launcher.cli.copies import refuse_copies
from launcher.config.cli_args import HydraArgs
from launcher.errors import EXIT_OK, UsageError
from launcher.topology import Topology

__all__ = ["run_tune"]


def run_tune(args: Sequence[str]) -> int:
    """Measure per-device batch sizes and recommend one, with -m for each point; under torchrun, act as this rank."""
    flags, topology = HydraArgs.parse(args), Topology.from_env()
    if handle_info_flags(flags, args):
        return EXIT_OK
    refuse_copies(topology)
    if flags.multirun:
        return run_tune_multirun(args, topology)
    from launcher.tune import driver

    if topology is None:
        return driver.tune_batch_size(resolve_config(args))
    return driver.main(lambda: resolve_config(args), topology)


def run_tune_multirun(args: Sequence[str], topology: Topology | None) -> int:
    if topology is not None:
        command = ["tune", *args, f"launch.workers={topology.world}"]
        raise UsageError(f"-m does not work in torchrun: type launcher {' '.join(command)} without torchrun")
    from launcher.tune import tune_sweep

    return tune_sweep.tune_sweep(args)
