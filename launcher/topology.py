"""This process's place in the job. The only module that reads the environment variables of torchrun and Slurm."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = [
    "USE_AGENT_STORE_ENV",
    "Topology",
    "count_slurm_restarts",
    "get_master_port",
    "get_slurm_job_id",
    "torchrun_env",
]

#: Environment with which a process beside a worker uses the job's store without serving it.
USE_AGENT_STORE_ENV: Mapping[str, str] = {"TORCHELASTIC_USE_AGENT_STORE": "True"}


@dataclass(frozen=True)
class Topology:
    """One worker's place in the job. `generation` counts the starts of a run's workers from 1; 0 is not known yet."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    node: int = 0
    nodes: int = 1
    generation: int = 0
    run_id: str | None = None
    slurm_job: str | None = None
    requeued: bool = False
    restarts: int = 0
    restarts_left: int = 0

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Topology | None:
        """Read the topology from torchrun's variables; None outside a job, as in the driver."""
        if "RANK" not in env:
            return None
        run_id = env.get("TORCHELASTIC_RUN_ID")
        restarts = int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return cls(
            rank=int(env["RANK"]),
            world=int(env.get("WORLD_SIZE", "1")),
            local_rank=int(env.get("LOCAL_RANK", "0")),
            local_world=int(env.get("LOCAL_WORLD_SIZE", "1")),
            node=int(env.get("GROUP_RANK", "0")),
            nodes=count_nodes(env),
            run_id=None if run_id in (None, "", "none") else run_id,
            slurm_job=get_slurm_job_id(env),
            requeued=count_slurm_restarts(env) > 0,
            restarts=restarts,
            restarts_left=int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")) - restarts,
        )

    @property
    def rank_and_generation(self) -> tuple[int, int]:
        """Rank and generation, which together name a log file."""
        return self.rank, self.generation

    def with_generation(self, generation: int) -> Topology:
        return replace(self, generation=generation)


def torchrun_env(rank: int, world: int, port: int) -> Mapping[str, str]:
    """The variables that torchrun sets for one of `world` workers on this machine with a store at `port`."""
    facts = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "ROLE_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "ROLE_WORLD_SIZE": world,
        "GROUP_RANK": 0,
        "GROUP_WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
    }
    return {**{name: str(value) for name, value in facts.items()}, **USE_AGENT_STORE_ENV}


def get_slurm_job_id(env: Mapping[str, str] = os.environ) -> str | None:
    """Slurm's job id (`123`, or `120_4` for an array task), by which a requeued job finds its run directory."""
    if array := env.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{env.get('SLURM_ARRAY_TASK_ID', '0')}"
    return env.get("SLURM_JOB_ID")


def count_slurm_restarts(env: Mapping[str, str] = os.environ) -> int:
    """How often Slurm has requeued this job."""
    return int(env.get("SLURM_RESTART_COUNT", "0"))


def count_nodes(env: Mapping[str, str]) -> int:
    """torchrun's number of agents, which may have unequal numbers of workers; else world size / local world size."""
    if count := env.get("GROUP_WORLD_SIZE"):
        return int(count)
    return max(1, int(env.get("WORLD_SIZE", "1")) // max(1, int(env.get("LOCAL_WORLD_SIZE", "1"))))


def get_master_port(env: Mapping[str, str] = os.environ) -> int:
    """The port of rank 0's store, as chosen by torchrun."""
    return int(env["MASTER_PORT"])
