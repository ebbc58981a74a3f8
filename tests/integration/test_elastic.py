"""Nodes that join and leave a training: real torchrun agents with a rendezvous, as on a cluster."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.checkpoint.manifest import latest_valid
from launcher.distributed.join_gate import wait_to_join
from launcher.run_dir.run_directory import RunDirectory
from tests.helpers.jobs import has_trained, make_env, read_events, read_rows, wait_for
from tests.helpers.small_job import HELD, run_launcher

pytestmark = pytest.mark.slow

StartAgent = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start_agent(workdir: Path) -> Iterator[StartAgent]:
    """Start torchrun agents of one job like nodes that come and go. The lowest address gets rank 0."""
    started: list[subprocess.Popen[bytes]] = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(*overrides: str, workers: int = 1, address: str = "127.0.0.2") -> subprocess.Popen[bytes]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:3", f"--nproc-per-node={workers}"]
        where = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=job", "--max-restarts=9"]
        first = f"--rdzv-conf=is_host={int(not started)},last_call_timeout=2,keep_alive_interval=1"
        argv = [*torchrun, *where, first, f"--local-addr={address}", "--monitor-interval=0.2", "-m", "launcher"]
        env = make_env(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        log = (workdir / f"agent{len(started)}.log").open("wb")
        started.append(subprocess.Popen([*argv, *overrides], cwd=workdir, env=env, stdout=log, stderr=log))
        return started[-1]

    yield start
    for agent in started:
        agent.kill()
        agent.wait()


def test_nodes_join_and_leave_while_training_continues(start_agent: StartAgent, workdir: Path) -> None:
    """Growth loses nothing; losing a node costs the updates since the checkpoint; the batch is constant.

    The joining node gets rank 0. The others inform it that the run has started, so `resume=never` starts no second run.
    """
    job = [*HELD, "train.duration=100000ep", "checkpoint.every=200ba", "run.name=x", "resume=never"]
    run_dir = workdir / "runs/x"

    def at(world: int) -> Callable[[], bool]:
        return lambda: bool(found := read_rows(run_dir)) and found[-1]["world"] == world

    first = start_agent(*job)
    start_agent(*job)
    wait_for(at(2))
    third = start_agent(*job, address="127.0.0.1")
    wait_for(at(3))
    grown = next(row for row in read_rows(run_dir) if row["world"] == 3)
    assert grown["elastic/lost_samples"] == 0, "the workers saved before they were started again"
    third.send_signal(signal.SIGKILL)
    wait_for(at(2))
    lost = next(row for row in read_rows(run_dir) if row["generation"] > grown["generation"])
    assert lost["elastic/lost_samples"] <= 210 * 50
    assert "stopped: at update" in run_launcher(workdir, "stop", "x").stdout
    assert first.wait(timeout=200) == 0
    found = read_rows(run_dir)
    updates = {row["update"] for row in found}
    assert updates == set(range(1, max(updates) + 1)), "no row is missing; the stop may come before what was lost"
    assert {row["batch/global"] for row in found} == {50}
    worlds = [(event["from"]["world"], event["to"]["world"]) for event in read_events(run_dir, "resize")]
    assert worlds[-2:] == [(2, 3), (3, 2)]
    assert [path.name for path in run_dir.parent.glob("x*")] == ["x"]
    starts = len(read_events(run_dir, "start"))
    assert int((run_dir / "restarts").read_text()) == starts - 1
    assert not (run_dir / "done.json").exists()


def test_nodes_may_have_different_numbers_of_workers(start_agent: StartAgent, workdir: Path) -> None:
    """One worker on the first node, two on the second: shares of 50 as with three workers.

    The second node waits to join until the first has saved and stopped, however long that takes.
    """
    job = [*HELD, "train.duration=100000ep", "checkpoint.every=100000ba", "run.name=h"]
    first = start_agent(*job)
    wait_for(has_trained(workdir / "runs/h"))
    wait_to_join(RunDirectory(workdir / "runs/h"), "second")
    saved = latest_valid(workdir / "runs/h/checkpoints").manifest.position["update"]
    assert read_rows(workdir / "runs/h")[-1]["update"] == saved
    start_agent(*job, workers=2)
    wait_for(lambda: bool(found := read_rows(workdir / "runs/h")) and found[-1]["world"] == 3)
    assert next(row["update"] for row in read_rows(workdir / "runs/h") if row["world"] == 3) == saved + 1
    (workdir / "runs/h/stop").touch()
    assert first.wait(timeout=200) == 0
    last = read_events(workdir / "runs/h", "start")[-1]
    assert (last["world"], last["nodes"]) == (3, 2)
    assert read_events(workdir / "runs/h", "plan")[-1]["shares"] == [17, 17, 16]
    assert {row["batch/global"] for row in read_rows(workdir / "runs/h")} == {50}
