"""The driver and its torchrun, as real processes: signals, exit statuses, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import (
    ENDS_WITHIN_S,
    has_trained,
    is_alive,
    kill_all,
    list_descendants,
    make_env,
    read_events,
    read_rows,
    restore_default_signals,
    wait_for,
)
from tests.helpers.small_job import LAUNCHER, TORCHRUN, run_launcher

pytestmark = pytest.mark.slow

LONG = ["recipe=mlp", "launch.workers=2", "sink=[]", "run.name=x", "batch=hold", "batch.global=64", "optimizer=sgd"]
LONG += ["lr.base=0.01", "lr.base_batch=64", "train.duration=100000ep", "train.validate_every=100000ep"]

StartDriver = Callable[..., "subprocess.Popen[str]"]


def ignore_hangup() -> None:
    """Ignore the closing of the terminal, as nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.fixture
def start_driver(tmp_path: Path) -> Iterator[StartDriver]:
    """Start the long job in a folder of its own; what is left of it is killed with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(prepare: Callable[[], None] = restore_default_signals) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [*LAUNCHER, *LONG],
                cwd=tmp_path,
                env=make_env(),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=prepare,  # noqa: PLW1509 (single-threaded here)
            )
        )
        wait_for(has_trained(tmp_path / "runs/x"))
        return started[-1]

    yield start
    for process in started:
        kill_all(process.pid)
        process.communicate()


def all_ended(pids: list[int]) -> Callable[[], bool]:
    """Whether none of the processes is alive."""
    return lambda: not [pid for pid in pids if is_alive(pid)]


def listening_addresses(pids: list[int]) -> set[str]:
    """Return the hex addresses on which any of these processes listens, over IPv4 and IPv6."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(link) if link.is_symlink() else ""
            inodes |= {target[8:-1]} if target.startswith("socket:[") else set()
    sockets = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {words[1].split(":")[0] for words in sockets if words[3] == "0A" and words[9] in inodes}


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.core), signal.SIGTERM, signal.SIGUSR1]
)
def test_signal_saves_and_stops_with_status_0(
    start_driver: StartDriver, tmp_path: Path, number: signal.Signals
) -> None:
    """While it trains, no process listens beyond the loopback address."""
    process = start_driver()
    processes = list_descendants(process.pid)
    assert len(processes) >= 3, "the agent and two workers"
    assert listening_addresses([process.pid, *processes]) == {"0100007F"}
    process.send_signal(number)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert f"{number.name}: saving at the next update" in stderr
    assert "run.name=x continues from there" in stderr
    assert not (tmp_path / "runs/x/done.json").exists()
    assert not (tmp_path / "runs/x/stop").exists(), "the next start does not stop"
    assert [event["why"] for event in read_events(tmp_path / "runs/x", "preempt")] == [number.name]
    assert list((tmp_path / "runs/x/checkpoints").glob("*/manifest.json"))
    assert all_ended(processes)()


def test_second_interrupt_ends_without_saving(start_driver: StartDriver, tmp_path: Path) -> None:
    process = start_driver()
    processes = list_descendants(process.pid)
    for pid in processes[1:]:
        os.kill(pid, signal.SIGSTOP)  # workers that cannot save
    process.send_signal(signal.SIGINT)
    wait_for((tmp_path / "runs/x/stop").exists)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=200)
    assert process.returncode == 130
    wait_for(all_ended(processes), within_s=ENDS_WITHIN_S)


def test_no_process_outlives_a_killed_driver(start_driver: StartDriver) -> None:
    process = start_driver()
    processes = list_descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    wait_for(all_ended(processes), within_s=ENDS_WITHIN_S)


def test_nohup_run_survives_hangup_but_not_its_agent(start_driver: StartDriver, tmp_path: Path) -> None:
    """A closed terminal ends nothing under nohup; if the agent is killed, every process ends, with an error."""
    process = start_driver(ignore_hangup)
    process.send_signal(signal.SIGHUP)
    wait_for(has_trained(tmp_path / "runs/x", len(read_rows(tmp_path / "runs/x")) + 20))
    assert process.poll() is None
    processes = list_descendants(process.pid)
    os.kill(processes[0], signal.SIGKILL)
    wait_for(all_ended(processes), within_s=ENDS_WITHIN_S)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    assert stderr.splitlines()[-1].startswith("error: ")


def test_stop_saves_a_run_started_elsewhere(start_driver: StartDriver, tmp_path: Path) -> None:
    process = start_driver()
    assert f"is run by process {process.pid} on " in run_launcher(tmp_path, "status", "x").stdout
    stopped = run_launcher(tmp_path, "stop", "x")
    assert process.wait(timeout=200) == 0
    assert [event["why"] for event in read_events(tmp_path / "runs/x", "preempt")] == ["launcher stop"]
    assert "runs/x stopped: at update " in stopped.stdout
    assert "nothing saved" not in stopped.stdout
    again = run_launcher(tmp_path, "stop", "runs/x")
    assert "is not running: at update " in again.stdout
    assert not (tmp_path / "runs/x/stop").exists()


def test_stop_now_ends_a_driver(start_driver: StartDriver, tmp_path: Path) -> None:
    check_stop_now(start_driver(), tmp_path)


def test_stop_now_ends_the_users_torchrun(tmp_path: Path) -> None:
    job = [argument for argument in LONG if not argument.startswith("launch.")]
    command = [*TORCHRUN, "--nproc-per-node=2", "--max-restarts=3", "-m", "launcher", *job]
    null = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=tmp_path, env=make_env(), stderr=null, stdout=null) as process:
        try:
            wait_for(has_trained(tmp_path / "runs/x"))
            check_stop_now(process, tmp_path)
        finally:
            kill_all(process.pid)


def check_stop_now(process: subprocess.Popen[Any], folder: Path) -> None:
    """Assert that `launcher stop --now` ends the process and its descendants."""
    processes = list_descendants(process.pid)
    assert "runs/x ended: at update " in run_launcher(folder, "stop", "x", "--now").stdout
    process.wait(timeout=200)
    wait_for(all_ended(processes), within_s=ENDS_WITHIN_S)
