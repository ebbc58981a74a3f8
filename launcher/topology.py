"""This process's place in the job. The only module that reads the environment variables of torchrun and Slurm."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = [
    "USE_AGENT_STORE_ENV",
    "TaskCopies",
    "Topology",
    "count_slurm_restarts",
    "find_slot_number",
    "find_task_copies",
    "get_batch_job_id",
    "get_master_address",
    "get_master_port",
    "get_slurm_job_id",
    "get_slurm_step_id",
    "is_torchrun_worker",
    "read_restart_count",
    "read_slurm_step",
    "select_torchrun_env",
    "torchrun_env",
]

FIRST_SPECIAL_STEP = 0xFFFFFFF0  # Slurm's ids from here on are no steps of srun: the batch script, an interactive shell
#: Number of processes that other launchers of tasks start, and of those on this node.
MPI_SIZES: Mapping[str, str] = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",  # OpenMPI, and LSF's jsrun
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_LOCAL_SIZE",  # MVAPICH
    "PMI_SIZE": "MPI_LOCALNRANKS",  # MPICH and Intel MPI
}

#: What torchrun sets for each worker, besides the names with its prefix; some of it changes at each start.
TORCHRUN_NAMES = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
TORCHRUN_PREFIX = "TORCHELASTIC_"

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


def get_batch_job_id(env: Mapping[str, str] = os.environ) -> str | None:
    """Slurm's job id in a batch script, which Slurm may requeue, and below it; None in an interactive allocation.

    Slurm sets ENVIRONMENT=BATCH for batch scripts alone, whatever the user's own value; an array is a batch job.
    """
    is_batch = env.get("ENVIRONMENT") == "BATCH" or "SLURM_ARRAY_JOB_ID" in env or count_slurm_restarts(env) > 0
    return get_slurm_job_id(env) if is_batch else None


def get_slurm_step_id(env: Mapping[str, str] = os.environ) -> str | None:
    """`123.4` for step 4 of job 123, the same on all nodes of the step; None outside a step of srun."""
    step = read_env_count(env, "SLURM_STEP_ID")
    job = get_slurm_job_id(env)
    return f"{job}.{step}" if job and "SLURM_STEP_ID" in env and step < FIRST_SPECIAL_STEP else None


@dataclass(frozen=True)
class TaskCopies:
    """Processes that `program`, a launcher of tasks, started from one command: `tasks` in all, on `nodes` nodes."""

    program: str
    tasks: int
    nodes: int

    @property
    def share_a_node(self) -> bool:
        return self.tasks > self.nodes


def find_task_copies(env: Mapping[str, str] = os.environ) -> TaskCopies | None:
    """The copies of this process that srun or mpirun started beside it; None if it is the only one.

    A batch script is one process, however many tasks its job asks for.
    """
    if get_slurm_step_id(env) is not None or read_env_count(env, "SLURM_PROCID"):
        tasks = read_env_count(env, "SLURM_STEP_NUM_TASKS") or read_env_count(env, "SLURM_NTASKS")
        nodes = read_env_count(env, "SLURM_STEP_NUM_NODES") or read_env_count(env, "SLURM_NNODES")
        if tasks > 1:
            return TaskCopies("srun", tasks, max(nodes, 1))
    for name, name_on_node in MPI_SIZES.items():
        if (tasks := read_env_count(env, name)) > 1:
            return TaskCopies("mpirun", tasks, max(1, tasks // (read_env_count(env, name_on_node) or tasks)))
    return None


def is_torchrun_worker(env: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process; RANK alone may have been set by hand."""
    return "RANK" in env and "TORCHELASTIC_RUN_ID" in env


def select_torchrun_env(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that torchrun has set for this start of a worker."""
    return {name: value for name, value in env.items() if name in TORCHRUN_NAMES or name.startswith(TORCHRUN_PREFIX)}


def find_slot_number(env: Mapping[str, str] = os.environ) -> int:
    """The number of a worker among those of its agent, the same at each start.

    It is the local rank, which torchrun's `--virtual-local-rank` hides: each worker is told 0. The folder of the file
    for its error is still named by it.
    """
    folder = posixpath.basename(posixpath.dirname(env.get("TORCHELASTIC_ERROR_FILE", "")))
    return int(folder) if folder.isdecimal() else read_env_count(env, "LOCAL_RANK")


def read_env_count(env: Mapping[str, str], name: str) -> int:
    """A variable's number; 0 if it is absent or no number."""
    text = env.get(name, "")
    return int(text) if text.isdecimal() else 0


def count_slurm_restarts(env: Mapping[str, str] = os.environ) -> int:
    """How often Slurm has requeued this job."""
    return int(env.get("SLURM_RESTART_COUNT", "0"))


def count_nodes(env: Mapping[str, str]) -> int:
    """torchrun's number of agents, which may have unequal numbers of workers; else world size / local world size."""
    if count := env.get("GROUP_WORLD_SIZE"):
        return int(count)
    return max(1, int(env.get("WORLD_SIZE", "1")) // max(1, int(env.get("LOCAL_WORLD_SIZE", "1"))))


def read_restart_count(env: Mapping[str, str]) -> int | None:
    """How often torchrun had restarted its workers when it started a process with this environment."""
    count = env.get("TORCHELASTIC_RESTART_COUNT")
    return int(count) if count and count.isdigit() else None


def read_slurm_step(env: Mapping[str, str] = os.environ) -> str:
    """Slurm's job and step, empty outside Slurm."""
    return " ".join(env.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")).strip()


def get_master_address(env: Mapping[str, str] = os.environ) -> str:
    """The host of the workers' store, as chosen by torchrun."""
    return env["MASTER_ADDR"]


def get_master_port(env: Mapping[str, str] = os.environ) -> int:
    """The port of rank 0's store, as chosen by torchrun."""
    return int(env["MASTER_PORT"])
