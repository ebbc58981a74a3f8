"""Refuse a command that srun or mpirun has started several times: every copy would train by itself."""

from __future__ import annotations

import os
from collections.abc import Sequence

from launcher.errors import UsageError
from launcher.system.formatting import format_plural
from launcher.system.processes import read_command_line
from launcher.topology import TaskCopies, Topology, find_task_copies, is_torchrun_worker

__all__ = ["refuse_copies"]


def refuse_copies(topology: Topology | None, shards: int = 1) -> None:
    """Refuse a copy of the driver, or of a torchrun that is not part of one job with the others.

    `shards`: the parts of a sweep, if this command runs only one of them: then copies divide the work.

    Raises:
        UsageError: this process is one of several copies.
    """
    copies = find_task_copies()
    if copies is None or shards > 1:
        return
    if topology is None:
        raise UsageError(describe_driver_copies(copies))
    if not is_torchrun_worker() or topology.nodes >= copies.tasks:
        return
    # fewer agents than copies have met: right only in an elastic job with one copy per node, where others join later
    if copies.share_a_node or is_single_node_agent(read_command_line(os.getppid())):
        raise UsageError(describe_torchrun_copies(copies))


def describe_driver_copies(copies: TaskCopies) -> str:
    if copies.nodes > 1:
        fix = f"type launch=slurm launch.nodes={copies.nodes} without {copies.program}, or sbatch slurm/train.sbatch"
    else:
        once = "srun --ntasks=1" if copies.program == "srun" else f"the command without {copies.program},"
        fix = f"type {once} with launch.workers={copies.tasks}"
    return (
        f"{describe_copies(copies, 'this command')}, and each would train by itself: "
        f"start one task per node, which starts the workers: {fix}"
    )


def describe_torchrun_copies(copies: TaskCopies) -> str:
    where = f"srun --nodes={copies.nodes} --ntasks-per-node=1"
    once = where if copies.program == "srun" else f"{copies.program} with one process per node"
    more = f" --nnodes={copies.nodes} --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT" if copies.nodes > 1 else ""
    return (
        f"{describe_copies(copies, 'torchrun')}, which do not form one job: start one task per node, "
        f"and its workers by --nproc-per-node: type {once} torchrun{more} --nproc-per-node=..."
    )


def describe_copies(copies: TaskCopies, what: str) -> str:
    where = f" on {format_plural(copies.nodes, 'node')}" if copies.nodes > 1 else ""
    return f"{copies.program} started {copies.tasks} copies of {what}{where}"


def is_single_node_agent(argv: Sequence[str]) -> bool:
    """Whether torchrun was started for one node only, so that no other agent can join: its default."""
    options = argv[: argv.index("launcher")] if "launcher" in argv else argv
    if "--standalone" in options:
        return True
    nnodes = os.environ.get("PET_NNODES", "1")
    for option, following in zip(options, [*options[1:], ""], strict=True):
        name, equals, value = option.partition("=")
        if name == "--nnodes":
            nnodes = value if equals else following
    return nnodes.rpartition(":")[2] == "1"
