"""Train several small jobs in sequence on the same ranks, so that torch is imported once.

`train_in_sequence` starts this file with torchrun and a file of jobs, a JSON object per line. Each job has its own
process group and run directory; one with `reload_from` trains nothing, but loads that checkpoint and saves it again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from launcher.checkpoint.manifest import open_checkpoint
from launcher.config.compose import resolve
from launcher.distributed import rendezvous
from launcher.distributed.stop_requests import StopRequests
from launcher.plan.training_plan import make_training_plan
from launcher.run_dir.open_run import open_run, write_run_files
from launcher.system.fault_injection import FaultInjector
from launcher.topology import Topology
from launcher.train import session
from launcher.train.build import build_components
from launcher.train.job_spec import JobSpec
from launcher.train.rank_outputs import make_checkpoint_manager
from launcher.train.rank_setup import prepare_rank, restore_state

__all__ = ["Job", "train_in_sequence"]


@dataclass(frozen=True)
class Job:
    """Arguments of a training, or of a job that loads the checkpoint `reload_from` and saves it again.

    `fault` is injected into this job only. `reads_late`: as on a GPU, the host reads the ranks' statistics one update
    late. A later job in the run directory `name` continues the earlier one; without a
    `name`, the run directory has the name of the job.
    """

    arguments: Sequence[str]
    reload_from: Path | None = None
    fault: str = ""
    name: str = ""
    reads_late: bool = False


def train_in_sequence(folder: Path, world_size: int, jobs: Mapping[str, Job], **env: str) -> None:
    """Run each of `jobs` on `world_size` workers, in sequence, in a subfolder of `folder`."""
    from tests.helpers.jobs import make_env

    file = folder / f"jobs-{world_size}.json"
    lines = [
        {
            "arguments": [*job.arguments, f"run.dir={folder / (job.name or name)}"],
            "reload_from": job.reload_from and str(job.reload_from),
            "faults": {"FAULT": job.fault} if job.fault else {},
            "late": {"READ_STATS_LATE": "1"} if job.reads_late else {},
        }
        for name, job in jobs.items()
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    completed = subprocess.run(
        [*torchrun, __file__, str(file)],
        check=False,
        env=make_env(**env),
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=1700,
    )
    stderr = [line for line in completed.stderr.splitlines() if not line.startswith("E1")]
    assert completed.returncode == 0, "\n".join(stderr[:60])


def main(jobs: Path) -> None:
    topology = Topology.from_env(os.environ)
    assert topology is not None
    port = int(os.environ["MASTER_PORT"]) + 1
    store = dist.TCPStore("127.0.0.1", port, topology.world, topology.rank == 0)
    for number, line in enumerate(jobs.read_text().splitlines()):
        own_store, job = dist.PrefixStore(str(number), store), json.loads(line)
        if topology.rank == 0:
            own_store.set("assignment", make_job_spec(job["arguments"], topology.world).to_json())
        job_spec = JobSpec.from_json(own_store.get("assignment").decode())
        own_topology = topology.with_generation(job_spec.generation)
        if job["reload_from"]:
            reload_and_save(job_spec, own_topology, own_store, Path(job["reload_from"]))
        else:
            with set_environment(job["faults"] | job["late"]):
                train(job_spec, own_topology, own_store)
        release_deepspeed_groups()


@contextmanager
def set_environment(variables: dict[str, str]) -> Iterator[None]:
    """Set the environment variables of one job's faults."""
    if variables:
        os.environ.update(variables, LAUNCHER_TEST_FAULTS="1")
    yield
    for name in (*variables, "LAUNCHER_TEST_FAULTS") if variables else ():
        del os.environ[name]


def train(job_spec: JobSpec, topology: Topology, store: dist.Store) -> None:
    """Train one job; a fault may stop it with SIGUSR1, as the driver does."""
    stop_requests = StopRequests()
    stop_requests.install()
    assert session.run_session(job_spec, topology, store, stop_requests, None) == 0
    stop_requests.ignore_late_signals()


def release_deepspeed_groups() -> None:
    """DeepSpeed keeps the groups of the first process group for the life of the process."""
    if "deepspeed" in sys.modules:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        groups._release_process_group_references()
        comm.cdb = None


def make_job_spec(args: list[str], world: int) -> JobSpec:
    found = open_run(resolve(args).config, world)
    found.run_dir.create()
    write_run_files(found)
    return JobSpec.from_opened(found, under_driver=True).start_generation()


def reload_and_save(job_spec: JobSpec, topology: Topology, store: dist.Store, checkpoint: Path) -> None:
    ready = prepare_rank(job_spec, topology)
    plan = make_training_plan(job_spec.config, ready.sizes, topology.world)
    rendezvous.init_process_group(store, topology, ready.device, "gloo", 60.0)
    components = build_components(ready.recipe, job_spec.config, topology, ready.device, ready.datasets)
    state = restore_state(components, plan, open_checkpoint(checkpoint), checkpoint.parent)
    checkpoint_manager = make_checkpoint_manager(job_spec, plan, components, None, topology, FaultInjector())
    checkpoint_manager.save(components.replica, plan, state, plan.batch_plan)
    checkpoint_manager.rows_written()
    checkpoint_manager.wait()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
