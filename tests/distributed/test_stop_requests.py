"""Stop requests from outside: real signals to a real process."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.distributed.stop_requests import StopLevel, StopRequests
from launcher.run_dir.run_directory import RunDirectory

PROGRAM = """
import sys, threading
from launcher.distributed.stop_requests import StopRequests
stop_requests = StopRequests(grace_s={grace_s})
stop_requests.install()
stop_requests.handle_sigterm()
print("ready", flush=True)
{then}
"""
STUCK = "threading.Event().wait()"
ACKNOWLEDGE = """
while not stop_requests.poll(None): pass
stop_requests.acknowledge()
print(stop_requests.reason, stop_requests.poll(None), flush=True)
threading.Event().wait(0.5)
"""


def start_process(then: str, grace_s: float = 0.2) -> subprocess.Popen[str]:
    code = PROGRAM.format(then=then, grace_s=grace_s)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_sigterm_without_agreement_exits_unsaved() -> None:
    process = start_process(STUCK)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75


@pytest.mark.parametrize(("number", "level"), [(signal.SIGTERM, StopLevel.RESTART), (signal.SIGUSR1, StopLevel.STOP)])
def test_acknowledged_request_has_no_time_limit(number: signal.Signals, level: int) -> None:
    process = start_process(ACKNOWLEDGE)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert (output.strip(), process.returncode) == (f"{number.name} {level}", 0)


def test_second_sigint_exits_at_once() -> None:
    process = start_process("while not stop_requests.poll(None): pass\nprint('received', flush=True)\n" + STUCK)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "received\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130


@pytest.fixture
def clock() -> Callable[[], float]:
    ticks = iter(range(100))
    return lambda: float(next(ticks))


def test_only_rank_0_polls_stop_file(tmp_path: Path, clock: Callable[[], float]) -> None:
    stop_requests, others = StopRequests(clock), StopRequests(clock)
    assert stop_requests.poll(RunDirectory(tmp_path)) == StopLevel.CONTINUE
    (tmp_path / "stop").touch()
    assert stop_requests.poll(RunDirectory(tmp_path)) == StopLevel.STOP
    assert stop_requests.reason == "the stop file"
    assert others.poll(None) == StopLevel.CONTINUE


def test_stop_file_polling_is_rate_limited(tmp_path: Path) -> None:
    stop_requests = StopRequests(clock=lambda: 1.0)
    assert stop_requests.poll(RunDirectory(tmp_path)) == StopLevel.CONTINUE
    (tmp_path / "stop").touch()
    assert stop_requests.poll(RunDirectory(tmp_path)) == StopLevel.CONTINUE, "no time has passed since"


def test_join_request_is_admitted_once_below_stop(tmp_path: Path, clock: Callable[[], float]) -> None:
    run_dir, stop_requests = RunDirectory(tmp_path), StopRequests(clock)
    assert stop_requests.poll(run_dir) == StopLevel.CONTINUE
    run_dir.join_requests_dir.mkdir()
    (run_dir.join_requests_dir / "node7-123").touch()
    assert stop_requests.poll(run_dir) == StopLevel.ADMIT_NODES
    assert run_dir.admit_nodes() == ["node7-123"]
    stop_requests.clear_admit()
    assert stop_requests.poll(run_dir) == StopLevel.CONTINUE, "the node has been admitted"
    (run_dir.join_requests_dir / "node8-5").touch()
    run_dir.stop_file.touch()
    assert stop_requests.poll(run_dir) == StopLevel.STOP
