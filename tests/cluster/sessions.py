"""Run several small trainings in sequence on the same ranks, so that torch is imported once.

Started by torchrun with a file of jobs, a JSON object a line. Each job has its own process group and run folder; one
with `carry` trains nothing, but loads that checkpoint and saves it again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from launcher import rendezvous, session
from launcher.assembly import assemble
from launcher.config import resolve
from launcher.faults import Faults
from launcher.heart import Still
from launcher.manifest import open_at
from launcher.opening import begin, opened
from launcher.record import Silent
from launcher.signals import Wishes
from launcher.study import study
from launcher.topology import Topology
from launcher.worker import Assignment


def main(jobs: Path) -> None:
    topology = Topology.of(os.environ)
    assert topology is not None
    port = int(os.environ["MASTER_PORT"]) + 1
    store = dist.TCPStore("127.0.0.1", port, topology.world, topology.rank == 0)
    for number, line in enumerate(jobs.read_text().splitlines()):
        own, job = dist.PrefixStore(str(number), store), json.loads(line)
        if topology.rank == 0:
            own.set("assignment", composed(job["arguments"], topology.world).to_json())
        assignment = Assignment.from_json(own.get("assignment").decode())
        here = topology.started(assignment.generation)
        if job["carry"]:
            carry(assignment, here, own, Path(job["carry"]))
        else:
            assert session.run(assignment, here, own, Wishes(), Still()) == 0
        forget()


def forget() -> None:
    """DeepSpeed keeps the groups of the first process group for the life of the process."""
    if "deepspeed" in sys.modules:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        groups._release_process_group_references()
        comm.cdb = None


def composed(args: list[str], world: int) -> Assignment:
    found = opened(resolve(args).run, world)
    found.folder.create()
    begin(found)
    return Assignment.of(found, loopback=True).started()


def carry(assignment: Assignment, topology: Topology, store: dist.Store, checkpoint: Path) -> None:
    ready = session.made_ready(assignment, topology)
    plan = study(assignment.run, ready.sizes, topology.world)
    rendezvous.join(store, topology, ready.device, "gloo", 60.0)
    parts = assemble(ready.recipe, assignment.run, topology, ready.device, ready.data)
    standing = session.restored(parts, plan, open_at(checkpoint), checkpoint.parent)
    saver = session.saver_of(assignment, plan, parts, Silent(), topology, Faults())
    saver.save(parts.replica, plan, standing, plan.plan)
    saver.told()
    saver.settle()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
