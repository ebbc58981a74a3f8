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
from tests.helpers.jobs import restore_default_signals

PROGRAM = """
import sys, threading
import launcher.distributed.stop_requests as module
from launcher.distributed.cleanup_process import CleanupProcess
from launcher.distributed.stop_requests import StopRequests
is_busy = False
stop_requests = StopRequests(CleanupProcess.start())
stop_requests.install()
stop_requests.handle_sigterm({grace_s}, lambda: is_busy)
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


def start_process(then: str, grace_s: float = 0.2, *, nohup: bool = False) -> subprocess.Popen[str]:
    code, pipe = PROGRAM.format(then=then, grace_s=grace_s), subprocess.PIPE
    hangup = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if nohup else restore_default_signals
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, preexec_fn=hangup)  # noqa: PLW1509
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_sigterm_without_agreement_exits_unsaved() -> None:
    process = start_process(STUCK)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75


def test_sigusr1_has_no_time_limit() -> None:
    process = start_process(ACKNOWLEDGE)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=20)
    assert (output.strip(), process.returncode) == (f"SIGUSR1 {StopLevel.STOP}", 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_acknowledged_sigterm_or_hangup_may_save_within_the_grace_time(number: signal.Signals) -> None:
    in_time, late = start_process(ACKNOWLEDGE, grace_s=60.0), start_process(ACKNOWLEDGE, grace_s=0.2)
    for process in (in_time, late):
        process.send_signal(number)
    output, _ = in_time.communicate(timeout=20)
    assert (output.strip(), in_time.returncode) == (f"{number.name} {StopLevel.RESTART}", 0)
    assert late.wait(timeout=20) == 1


def test_hangup_stays_ignored_under_nohup() -> None:
    process = start_process("stop_requests.poll(None)\nsys.stdin.readline()\nprint(stop_requests.reason)", nohup=True)
    process.send_signal(signal.SIGHUP)
    assert process.communicate("go on\n", timeout=20)[0] == "None\n"


def test_rank_without_agreement_leaves_after_a_few_updates() -> None:
    """Of a grace time of ten minutes it uses four updates, or five seconds."""
    trained = "stop_requests.poll(None)\nstop_requests.poll(None)\nprint('trained', flush=True)\n"
    process = start_process(trained + STUCK, grace_s=600.0)
    assert process.stdout is not None
    assert process.stdout.readline() == "trained\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=200) == 75


def test_validation_and_saves_are_waited_for() -> None:
    """As long as a rank is busy with one, the wait for an agreement is not over: it still saves within its time."""
    busy = "is_busy, module.MIN_AGREEMENT_S, stop_requests._update_s = True, 0.01, 0.01\nprint('busy', flush=True)\n"
    updating = "sys.stdin.readline()\nis_busy = False\n"
    process = start_process(busy + updating + STUCK, grace_s=600.0)
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.0)  # a hundred times the wait without a busy rank
    process.communicate("go on\n", timeout=200)
    assert process.returncode == 75, "the others are gone or stuck"


@pytest.mark.parametrize("library", ["PyDLL", "CDLL"])
def test_sigterm_ends_a_process_whose_interpreter_is_held(library: str) -> None:
    """A library that does not return, with or without the interpreter's lock: no handler of Python's can run."""
    lock = f"lock = ctypes.{library}(None).pthread_mutex_lock"
    process = start_process(f"import ctypes\n{lock}\nmutex = ctypes.create_string_buffer(64)\nlock(mutex), lock(mutex)")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=200) in (-signal.SIGKILL, 75), "75: the signal came before the call"


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
    stop_requests, others = StopRequests(clock=clock), StopRequests(clock=clock)
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
    run_dir, stop_requests = RunDirectory(tmp_path), StopRequests(clock=clock)
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
