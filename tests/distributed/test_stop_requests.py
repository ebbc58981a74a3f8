"""Stop requests from outside: real signals to a real process."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.distributed.stop_requests import GO_ON, JOIN, LEAVE, STOP, StopRequests
from launcher.run_dir.run_directory import RunDirectory

WAITING = """
import sys, threading
from launcher.distributed.stop_requests import StopRequests
stop_requests = StopRequests(leave_s={leave_s})
stop_requests.install()
stop_requests.handle_sigterm()
print("ready", flush=True)
{then}
"""
STUCK = "threading.Event().wait()"
HEARD = """
while not stop_requests.poll(None): pass
stop_requests.acknowledge()
print(stop_requests.reason, stop_requests.poll(None), flush=True)
threading.Event().wait(0.5)
"""


def waiting(then: str, leave_s: float = 0.2) -> subprocess.Popen[str]:
    code = WAITING.format(then=then, leave_s=leave_s)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_told_to_leave_and_stuck_among_others_it_leaves_unsaved_to_be_started_again() -> None:
    process = waiting(STUCK)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75


@pytest.mark.parametrize(("number", "wish"), [(signal.SIGTERM, LEAVE), (signal.SIGUSR1, STOP)])
def test_once_the_ranks_have_agreed_saving_takes_as_long_as_it_takes(number: signal.Signals, wish: int) -> None:
    process = waiting(HEARD)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert (output.strip(), process.returncode) == (f"{number.name} {wish}", 0)


def test_a_second_interrupt_leaves_at_once() -> None:
    process = waiting("while not stop_requests.poll(None): pass\nprint('asked', flush=True)\n" + STUCK)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130


@pytest.fixture
def clock() -> Callable[[], float]:
    ticks = iter(range(100))
    return lambda: float(next(ticks))


def test_the_stop_file_is_a_wish_and_only_rank_0_looks_for_it(tmp_path: Path, clock: Callable[[], float]) -> None:
    stop_requests, others = StopRequests(clock), StopRequests(clock)
    assert stop_requests.poll(RunDirectory(tmp_path)) == GO_ON
    (tmp_path / "stop").touch()
    assert stop_requests.poll(RunDirectory(tmp_path)) == STOP
    assert stop_requests.reason == "the stop file"
    assert others.poll(None) == GO_ON


def test_the_stop_file_is_not_looked_for_at_every_update(tmp_path: Path) -> None:
    stop_requests = StopRequests(clock=lambda: 1.0)
    assert stop_requests.poll(RunDirectory(tmp_path)) == GO_ON
    (tmp_path / "stop").touch()
    assert stop_requests.poll(RunDirectory(tmp_path)) == GO_ON, "no time has passed since"


def test_a_node_at_the_gate_is_let_in_once_and_does_not_outweigh_a_stop(
    tmp_path: Path, clock: Callable[[], float]
) -> None:
    run_dir, stop_requests = RunDirectory(tmp_path), StopRequests(clock)
    assert stop_requests.poll(run_dir) == GO_ON
    run_dir.join_requests_dir.mkdir()
    (run_dir.join_requests_dir / "node7-123").touch()
    assert stop_requests.poll(run_dir) == JOIN
    assert run_dir.admit_nodes() == ["node7-123"]
    stop_requests.clear_admit()
    assert stop_requests.poll(run_dir) == GO_ON, "it has gone on and joins"
    (run_dir.join_requests_dir / "node8-5").touch()
    run_dir.stop_file.touch()
    assert stop_requests.poll(run_dir) == STOP
