"""Who this process is in the job. The only module that reads what torchrun and Slurm put in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = ["AS_GUEST", "Topology", "as_rank", "master_port", "slurm_job", "slurm_restarts"]

#: What lets a process beside a worker use the job's store without serving it.
AS_GUEST: Mapping[str, str] = {"TORCHELASTIC_USE_AGENT_STORE": "True"}


@dataclass(frozen=True)
class Topology:
    """One worker's place. `generation` counts the starts of the workers of one run, from 1; 0 is not yet known."""

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
    def of(cls, env: Mapping[str, str] = os.environ) -> Topology | None:
        """The worker's place from torchrun's variables, or None outside a job (the driver)."""
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
            nodes=nodes_of(env),
            run_id=None if run_id in (None, "", "none") else run_id,
            slurm_job=slurm_job(env),
            requeued=slurm_restarts(env) > 0,
            restarts=restarts,
            restarts_left=int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")) - restarts,
        )

    @property
    def place(self) -> tuple[int, int]:
        """Rank and generation: what names a log."""
        return self.rank, self.generation

    def started(self, generation: int) -> Topology:
        return replace(self, generation=generation)


def as_rank(rank: int, world: int, port: int) -> Mapping[str, str]:
    """What torchrun would tell one of `world` workers of this machine, whose store listens at `port`."""
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
    return {**{name: str(value) for name, value in facts.items()}, **AS_GUEST}


def slurm_job(env: Mapping[str, str] = os.environ) -> str | None:
    """Slurm's job, `123` or `120_4` for a task of an array, so that a requeued job finds its folder; else None."""
    if array := env.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{env.get('SLURM_ARRAY_TASK_ID', '0')}"
    return env.get("SLURM_JOB_ID")


def slurm_restarts(env: Mapping[str, str] = os.environ) -> int:
    """How often Slurm has queued this job again."""
    return int(env.get("SLURM_RESTART_COUNT", "0"))


def nodes_of(env: Mapping[str, str]) -> int:
    """torchrun's count of its agents, which may have different numbers of workers; else what the workers' tell."""
    if count := env.get("GROUP_WORLD_SIZE"):
        return int(count)
    return max(1, int(env.get("WORLD_SIZE", "1")) // max(1, int(env.get("LOCAL_WORLD_SIZE", "1"))))


def master_port(env: Mapping[str, str] = os.environ) -> int:
    """The port that torchrun chose for rank 0's store."""
    return int(env["MASTER_PORT"])
