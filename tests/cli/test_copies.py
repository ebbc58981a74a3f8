"""A command that srun or mpirun started several times: refused, since each copy would train alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from launcher.cli import copies
from launcher.cli.copies import refuse_copies
from launcher.cli.main import main
from launcher.errors import EXIT_OK, EXIT_USAGE, UsageError
from launcher.topology import Topology, get_slurm_job_id

#: What a real Slurm sets in a job, in the only task of a step, and in a task of a step with four on two nodes.
JOB = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"}
SINGLE_TASK = {
    **JOB,
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NUM_NODES": "1",
}
STEP = {**JOB, "SLURM_STEP_ID": "3", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
TWO_ON_A_NODE = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
ONE_PER_NODE = {**STEP, "SLURM_STEP_NUM_TASKS": "2"}

WORKER = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "4711"}
AGENT = ("python", "-m", "torch.distributed.run")
ELASTIC = (*AGENT, "--nnodes=1:2", "--rdzv-backend=c10d", "-m", "launcher")


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM_", "RANK", "TORCHELASTIC_", "OMPI_", "PMI_")):
            monkeypatch.delenv(name)


@pytest.fixture
def run_dry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Run the driver, which starts nothing, with additional environment variables."""
    monkeypatch.chdir(tmp_path)

    def run(env: Mapping[str, str], *words: str) -> int:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return main([*words, "recipe=mlp", "launch.dry_run=true", "train.device=cpu"])

    return run


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (STEP, "srun started 4 copies of this command on 2 nodes"),
        ({**STEP, "SLURM_PROCID": "0"}, "srun started 4 copies"),
        (TWO_ON_A_NODE, "srun started 2 copies of this command"),
        (ONE_PER_NODE, "launch=slurm launch.nodes=2"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun started 2 copies"),
        ({"PMI_SIZE": "3", "PMI_RANK": "2"}, "mpirun started 3 copies"),
        ({**SINGLE_TASK, "MV2_COMM_WORLD_SIZE": "2"}, "mpirun started 2 copies"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "tune"])
def test_copies_of_the_driver_are_refused(
    run_dry: Callable[..., int],
    tmp_path: Path,
    env: Mapping[str, str],
    said: str,
    verb: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_dry(env, verb) == EXIT_USAGE
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "one task per node" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("env", [{}, JOB, SINGLE_TASK, {**JOB, "SLURM_PROCID": "0"}, {"OMPI_COMM_WORLD_SIZE": "1"}])
def test_a_single_copy_may_run(run_dry: Callable[..., int], env: Mapping[str, str]) -> None:
    """Without Slurm, in a batch script that asked for four tasks, as the only task of a step, and under mpirun -n 1."""
    assert run_dry(env) == EXIT_OK


def test_the_interactive_step_is_one_copy(run_dry: Callable[..., int]) -> None:
    """The shell that salloc may open on the first node has the job's number of tasks, and a step id of its own."""
    assert run_dry({**JOB, "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}) == EXIT_OK


def test_tasks_that_share_a_sweep_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task of `srun launcher -m --shard=$SLURM_PROCID/4` trains points of its own."""
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="one task per node"):
        refuse_copies(None)
    refuse_copies(None, shards=4)


@pytest.mark.parametrize(
    ("env", "argv", "said"),
    [
        (TWO_ON_A_NODE, (*AGENT, "--standalone", "-m", "launcher"), "srun --nodes=1 --ntasks-per-node=1"),
        (STEP, (*AGENT, "--nnodes=2", "-m", "launcher"), "srun --nodes=2 --ntasks-per-node=1"),
        (ONE_PER_NODE, (*AGENT, "-m", "launcher"), "--nnodes=2"),
        (ONE_PER_NODE, (*AGENT, "--nnodes", "1", "-m", "launcher"), "--nnodes=2"),
        (ONE_PER_NODE, (*AGENT, "--standalone", "--nnodes=1:2", "-m", "launcher"), "--nnodes=2"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (*AGENT, "-m", "launcher"), "mpirun"),
    ],
)
def test_copies_of_torchrun_are_refused(
    monkeypatch: pytest.MonkeyPatch, env: Mapping[str, str], argv: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UsageError, match="one task per node") as caught:
        check_worker(monkeypatch, env, argv)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("env", "argv"),
    [
        (ONE_PER_NODE, ELASTIC),  # the other node may join later
        ({**ONE_PER_NODE, "GROUP_WORLD_SIZE": "2"}, (*AGENT, "--nnodes=2", "-m", "launcher")),
        ({**TWO_ON_A_NODE, "GROUP_WORLD_SIZE": "2"}, (*AGENT, "--nnodes=2", "-m", "launcher")),  # both in one job
        (SINGLE_TASK, (*AGENT, "-m", "launcher")),
        (JOB, (*AGENT, "-m", "launcher")),
    ],
)
def test_agents_of_one_job_may_run(
    monkeypatch: pytest.MonkeyPatch, env: Mapping[str, str], argv: tuple[str, ...]
) -> None:
    check_worker(monkeypatch, env, argv)


def check_worker(monkeypatch: pytest.MonkeyPatch, env: Mapping[str, str], argv: tuple[str, ...]) -> None:
    for name, value in {**WORKER, "GROUP_WORLD_SIZE": "1", **env}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(copies, "read_command_line", lambda pid: argv)
    refuse_copies(Topology.from_env())


def test_only_a_batch_job_or_a_requeue_is_named_after_the_job() -> None:
    interactive = {**JOB, "SLURM_JOB_NAME": "interactive"}
    assert get_slurm_job_id(interactive) == "4711"
    from launcher.topology import get_batch_job_id

    assert get_batch_job_id(interactive) is None
    assert get_batch_job_id({**SINGLE_TASK, "SLURM_JOB_NAME": "bash"}) is None
    assert get_batch_job_id({**JOB, "ENVIRONMENT": "BATCH"}) == "4711"
    assert get_batch_job_id({**JOB, "SLURM_RESTART_COUNT": "1"}) == "4711"
    assert get_batch_job_id({**JOB, "SLURM_RESTART_COUNT": "0"}) is None
    assert get_batch_job_id({**JOB, "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}) == "12_3"
    assert get_batch_job_id({"ENVIRONMENT": "BATCH"}) is None
