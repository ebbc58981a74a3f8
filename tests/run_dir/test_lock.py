"""The lock of a run directory: held by one process at a time, released when it dies."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.run_dir import lock
from launcher.run_dir.run_directory import RunDirectory
from launcher.system.processes import read_start_time


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "runs" / "one")
    made.create()
    return made


HOLDER = r"""
import os, signal, sys
from pathlib import Path
from launcher.run_dir.run_directory import RunDirectory
lock = RunDirectory(Path(sys.argv[1])).lock()
if sys.argv[2] == "forks" and os.fork() == 0:
    os.write(1, f"forked {os.getpid()}\n".encode())  # in one piece: both write to one pipe
    signal.pause()
os.write(1, f"holds {os.getpid()}\n".encode())
signal.pause()
"""


def start_holder(run_dir: RunDirectory, kind: str = "alone") -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLDER, str(run_dir.path), kind], stdout=subprocess.PIPE, text=True)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def test_second_job_is_refused_with_owner(run_dir: RunDirectory) -> None:
    first = start_holder(run_dir)
    try:
        assert read_line(first) == f"holds {first.pid}\n"
        with pytest.raises(UsageError) as error:
            run_dir.lock()
    finally:
        kill(first)
    owner = rf"process {first.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\dT[\d:]+\+?[\d:-]*"
    assert re.fullmatch(rf"{re.escape(str(run_dir.path))} is in use by {owner}: wait .*run\.name=", str(error.value))
    run_dir.lock().release()  # a killed process leaves no lock


def test_lock_also_excludes_same_process(run_dir: RunDirectory) -> None:
    lock = run_dir.lock()
    with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        run_dir.lock()
    lock.release()
    run_dir.lock().release()


def test_forked_child_does_not_hold_the_lock(run_dir: RunDirectory) -> None:
    """A loader process outlives its rank by seconds; the restarted rank must not wait for it."""
    first = start_holder(run_dir, "forks")
    lines = dict(read_line(first).split() for _ in range(2))
    child = int(lines["forked"])
    try:
        first.kill()
        first.wait()
        assert read_start_time(child) is not None
        run_dir.lock().release()
    finally:
        os.kill(child, signal.SIGKILL)
        kill(first)


def test_file_system_without_locks_is_named(run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with pytest.raises(UsageError, match=r"cannot be locked \(Function not implemented\): type run\.dir="):
        run_dir.lock()
