"""The same training at any world size: through stops, joins and losses of real torchrun agents."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_main_job import HELD, OWN, TORCHRUN, driven, here, run  # noqa: F401 (a fixture)

from launcher.checkpoint.manifest import latest_valid
from launcher.distributed.join_gate import wait_to_join
from launcher.run_dir.run_directory import RunDirectory
from tests.helpers.jobs import environment, events, furthest, rows, training, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def stopped_at(update: int, generation: int) -> dict[str, str]:
    return {"LAUNCHER_TEST_FAULTS": "1", "FAULT": f"stop@forward:0:{update}:{generation}"}


def test_held_training_is_the_same_at_2_then_1_then_3_then_4_workers(here: Path) -> None:  # noqa: F811
    """Adam, a cosine schedule and unequal shares (13, 13, 12, 12): parameters equal those of one process."""
    job = [*HELD, "train.precision=fp64", "optimizer=adamw", "lr.base=0.01", "schedule=cosine", "schedule.warmup=1ep"]
    driven(here, *job, "launch.workers=1", "run.name=whole")
    for generation, (world, update) in enumerate([(2, 6), (1, 11), (3, 17), (4, 0)], start=1):
        faults = stopped_at(update, generation) if update else {}
        driven(here, *job, f"launch.workers={world}", "run.name=parts", **faults)
    assert furthest(here / "runs/whole", here / "runs/parts") <= 1e-10
    parts = rows(here / "runs/parts")
    assert [row["update"] for row in parts] == list(range(1, 26)), "none is lost, none is run twice"
    assert [row["lr/value"] for row in parts] == [row["lr/value"] for row in rows(here / "runs/whole")]
    resizes = events(here / "runs/parts", "resize")
    assert [(event["from"]["world"], event["to"]["world"]) for event in resizes] == [(2, 1), (1, 3), (3, 4)]
    assert resizes[1]["to"]["shares"] == [17, 17, 16]
    assert resizes[2]["why"] == "3 workers before, 4 now"


def test_scaled_training_follows_the_workers_and_the_rate_follows_the_batch(here: Path) -> None:  # noqa: F811
    job = [*OWN, "batch.per_device=10", "sink=[]", "train.duration=6ep", "schedule=constant", "schedule.warmup=0sp"]
    for generation, (world, update) in enumerate([(2, 15), (1, 30), (3, 0)], start=1):
        faults = stopped_at(update, generation) if update else {}
        driven(here, *job, f"launch.workers={world}", "run.name=s", **faults)
    found = rows(here / "runs/s")
    assert [row["update"] for row in found] == list(range(1, len(found) + 1))
    assert found[-1]["samples"] == 6 * 203, "every sample of every epoch, once"
    scales = {row["batch/global"]: row["lr/scale"] for row in found}
    assert scales[20] == pytest.approx(20 / 50)
    assert scales[10] == pytest.approx(10 / 50)
    grown = [row["lr/scale"] for row in found if row["batch/global"] == 30]
    assert grown[0] < 30 / 50, "growth by 2 or more ramps"
    assert grown == sorted(grown)


SLOW = """
import os, time
from dataclasses import dataclass
import own

@dataclass(frozen=True)
class Slow(own.Own):
    def loss(self, model, batch):
        time.sleep(len(batch[1]) * (0.002 if os.environ["RANK"] == "1" else 0.0005))
        return super().loss(model, batch)
"""


def test_shares_follow_the_measured_speeds_and_the_training_stays_the_same(here: Path) -> None:  # noqa: F811
    """Rank 1 takes four times as long per sample: it ends up with about a fifth of the batch."""
    (here / "slow.py").write_text(SLOW)
    job = [*HELD, "recipe._target_=slow.Slow", "recipe.trust=[slow]", "batch.per_device=50", "train.precision=fp64"]
    driven(here, *job, "train.duration=10ep", "launch.workers=1", "run.name=one")
    driven(here, *job, "train.duration=10ep", "launch.workers=2", "elastic.balance=true", "run.name=two")
    assert furthest(here / "runs/one", here / "runs/two") <= 1e-10
    changes = events(here / "runs/two", "plan")[1:]
    assert changes[0]["from"]["shares"] == [25, 25]
    assert changes[0]["shares"][1] <= 15
    assert changes[0]["global"] == 50
    assert changes[0]["why"] == "shares follow the measured speeds of the workers"
    assert [row["update"] for row in rows(here / "runs/two")] == list(range(1, 51))


@pytest.fixture
def agents(here: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:  # noqa: F811
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
        env = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        log = (here / f"agent{len(started)}.log").open("wb")
        started.append(subprocess.Popen([*argv, *overrides], cwd=here, env=env, stdout=log, stderr=log))
        return started[-1]

    yield start
    for agent in started:
        agent.kill()
        agent.wait()


def test_nodes_join_and_are_lost_and_training_goes_on(
    agents: Callable[..., subprocess.Popen[bytes]],
    here: Path,  # noqa: F811
) -> None:
    """Growth loses nothing; losing a node costs the updates since the checkpoint; the batch is constant.

    The joining node gets rank 0. The others inform it that the run has started, so `resume=never` starts no second run.
    """
    job = [*HELD, "train.duration=100000ep", "checkpoint.every=200ba", "run.name=x", "resume=never"]
    run_dir = here / "runs/x"

    def at(world: int) -> Callable[[], bool]:
        return lambda: bool(found := rows(run_dir)) and found[-1]["world"] == world

    first = agents(*job)
    agents(*job)
    wait_for(at(2))
    third = agents(*job, address="127.0.0.1")
    wait_for(at(3))
    grown = next(row for row in rows(run_dir) if row["world"] == 3)
    assert grown["elastic/lost_samples"] == 0, "the workers saved before they were started again"
    third.send_signal(signal.SIGKILL)
    wait_for(at(2))
    lost = next(row for row in rows(run_dir) if row["generation"] > grown["generation"])
    assert lost["elastic/lost_samples"] <= 210 * 50
    stopped = subprocess.run(
        [sys.executable, "-m", "launcher", "stop", "x"], cwd=here, capture_output=True, timeout=60, check=True
    )
    assert b"stopped: at update" in stopped.stdout
    assert first.wait(timeout=30) == 0
    found = rows(run_dir)
    updates = {row["update"] for row in found}
    assert updates == set(range(1, max(updates) + 1)), "no row is missing; the stop may come before what was lost"
    assert {row["batch/global"] for row in found} == {50}
    worlds = [(event["from"]["world"], event["to"]["world"]) for event in events(run_dir, "resize")]
    assert worlds[-2:] == [(2, 3), (3, 2)]
    assert [path.name for path in run_dir.parent.glob("x*")] == ["x"]
    starts = len(events(run_dir, "start"))
    assert int((run_dir / "restarts").read_text()) == starts - 1
    assert not (run_dir / "done.json").exists()


def test_nodes_with_different_numbers_of_workers_are_planned_as_they_are(
    agents: Callable[..., subprocess.Popen[bytes]],
    here: Path,  # noqa: F811
) -> None:
    """One worker on the first node, two on the second: shares of 50 as with three workers.

    The second node waits to join until the first has saved and stopped, however long that takes.
    """
    job = [*HELD, "train.duration=100000ep", "checkpoint.every=100000ba", "run.name=h"]
    first = agents(*job)
    wait_for(training(here / "runs/h"))
    wait_to_join(RunDirectory(here / "runs/h"), "second")
    saved = latest_valid(here / "runs/h/checkpoints").manifest.position["update"]
    assert rows(here / "runs/h")[-1]["update"] == saved
    agents(*job, workers=2)
    wait_for(lambda: bool(found := rows(here / "runs/h")) and found[-1]["world"] == 3, 120)
    assert next(row["update"] for row in rows(here / "runs/h") if row["world"] == 3) == saved + 1
    (here / "runs/h/stop").touch()
    assert first.wait(timeout=60) == 0
    last = events(here / "runs/h", "start")[-1]
    assert (last["world"], last["nodes"]) == (3, 2)
    assert events(here / "runs/h", "plan")[-1]["shares"] == [17, 17, 16]
    assert {row["batch/global"] for row in rows(here / "runs/h")} == {50}


def test_kills_under_the_users_own_torchrun_whatever_its_store(here: Path) -> None:  # noqa: F811
    """`--standalone` shares the agent's store with the workers: leftovers of earlier starts must not mislead them."""
    argv = [
        *TORCHRUN,
        "--nproc-per-node=3",
        "--max-restarts=9",
        "-m",
        "launcher",
        *HELD,
        "train.precision=fp64",
        "run.name=k",
    ]
    kills = [
        f"kill@forward:{rank}:{update}:{start}" for start, (rank, update) in enumerate([(1, 4), (0, 6), (2, 9)], 1)
    ]
    run(argv, here, LAUNCHER_TEST_FAULTS="1", FAULT=",".join(kills))
    driven(here, *HELD, "train.precision=fp64", "launch.workers=3", "run.name=whole")
    assert furthest(here / "runs/k", here / "runs/whole") <= 1e-10
    assert [event["generation"] for event in events(here / "runs/k", "start")] == [1, 2, 3, 4]


KILLS = [
    *("start:1:0", "rendezvous:1:0", "restore:0:0", "data:1:7", "forward:0:8", "backward:1:9", "sync:0:9"),
    *("optimizer:1:10", "checkpoint-write:0:10", "checkpoint-rename:0:10", "validate:1:15", "finish:0:0"),
]


def struck(run_dir: Path, fault: str) -> bool:
    """Whether the rank of a fault recorded that the fault was triggered."""
    rank, generation = fault.split(":")[1], fault.split(":")[3]
    return f"injected fault: {fault}\n" in (run_dir / f"logs/rank{rank}-g{generation}.log").read_text()


@pytest.mark.timeout(500)
def test_a_kill_in_every_phase_changes_nothing(here: Path) -> None:  # noqa: F811
    """One job, killed twelve times at different points; every sample of every epoch counts once."""
    job = [*HELD, "launch.workers=2", "+recipe.drop=0.3", "checkpoint.every=1ep", "elastic.max_restarts=20"]
    driven(here, *job, "run.name=whole")
    kills = [f"kill@{where}:{start}" for start, where in enumerate(KILLS, start=1)]
    driven(here, *job, "run.name=killed", LAUNCHER_TEST_FAULTS="1", FAULT=",".join(kills))
    killed, whole = here / "runs/killed", here / "runs/whole"
    assert [kill for kill in kills if not struck(killed, kill)] == []
    assert (killed / "generation").read_text() == "13\n", (
        "each of them ended one start of the workers, nothing else did"
    )
    assert json.loads((killed / "done.json").read_text())["restarts"] == 12
    assert furthest(whole, killed) == 0.0
    last = {row["update"]: row.get("train/loss") for row in rows(killed)}
    assert [last[update] for update in range(1, 26)] == [row["train/loss"] for row in rows(whole)]
    assert not events(killed, "error"), "who lost a peer has no error of its own"


def test_a_rank_without_samples_trains_along(here: Path) -> None:  # noqa: F811
    """A batch of 2 on 3 workers: allowed by elastic.allow_idle, equal to one process with the whole batch."""
    job = [*HELD, "batch.global=2", "lr.base_batch=2", "train.duration=0.2ep", "train.precision=fp64"]
    for world in (1, 3):
        driven(here, *job, "elastic.allow_idle=true", f"launch.workers={world}", f"run.name=w{world}")
    assert furthest(here / "runs/w1", here / "runs/w3") <= 1e-10
