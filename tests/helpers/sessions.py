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

from launcher.checkpoint.manifest import open_checkpoint
from launcher.config.compose import resolve
from launcher.distributed import rendezvous
from launcher.distributed.stop_requests import StopRequests
from launcher.distributed.watchdog import NullWatchdog
from launcher.plan.training_plan import make_training_plan
from launcher.run_dir.open_run import open_run, write_run_files
from launcher.system.fault_injection import FaultInjector
from launcher.topology import Topology
from launcher.train import session
from launcher.train.assignment import JobSpec
from launcher.train.build import build_components
from launcher.train.metrics_recorder import NullRecorder


def main(jobs: Path) -> None:
    topology = Topology.from_env(os.environ)
    assert topology is not None
    port = int(os.environ["MASTER_PORT"]) + 1
    store = dist.TCPStore("127.0.0.1", port, topology.world, topology.rank == 0)
    for number, line in enumerate(jobs.read_text().splitlines()):
        own, job = dist.PrefixStore(str(number), store), json.loads(line)
        if topology.rank == 0:
            own.set("assignment", composed(job["arguments"], topology.world).to_json())
        job_spec = JobSpec.from_json(own.get("assignment").decode())
        here = topology.with_generation(job_spec.generation)
        if job["carry"]:
            carry(job_spec, here, own, Path(job["carry"]))
        else:
            assert session.run(job_spec, here, own, StopRequests(), NullWatchdog()) == 0
        forget()


def forget() -> None:
    """DeepSpeed keeps the groups of the first process group for the life of the process."""
    if "deepspeed" in sys.modules:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        groups._release_process_group_references()
        comm.cdb = None


def composed(args: list[str], world: int) -> JobSpec:
    found = open_run(resolve(args).config, world)
    found.run_dir.create()
    write_run_files(found)
    return JobSpec.from_opened(found, loopback=True).start_generation()


def carry(job_spec: JobSpec, topology: Topology, store: dist.Store, checkpoint: Path) -> None:
    ready = session.prepare_rank(job_spec, topology)
    plan = make_training_plan(job_spec.config, ready.sizes, topology.world)
    rendezvous.init_process_group(store, topology, ready.device, "gloo", 60.0)
    components = build_components(ready.recipe, job_spec.config, topology, ready.device, ready.data)
    state = session.restore_state(components, plan, open_checkpoint(checkpoint), checkpoint.parent)
    checkpoint_manager = session.make_checkpoint_manager(
        job_spec, plan, components, NullRecorder(), topology, FaultInjector()
    )
    checkpoint_manager.save(components.replica, plan, state, plan.plan)
    checkpoint_manager.rows_written()
    checkpoint_manager.wait()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
