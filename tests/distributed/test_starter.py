"""Processes that die with the one that started them, also if that has ended before their first line."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.distributed.starter import find_agent, make_starter_env
from launcher.system.processes import identify_process
from tests.helpers.jobs import is_alive, wait_for

BOUND = """
import sys
from launcher.distributed.starter import die_with_starter
print(die_with_starter(), flush=True)
sys.stdin.readline()
"""
TORCHRUN_ENV = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}


def start_bound(**env: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", BOUND], stdin=pipe, stdout=pipe, text=True, env=os.environ | env)


def test_process_lives_with_its_starter_alone() -> None:
    started = start_bound(**make_starter_env())
    assert started.communicate("end\n", timeout=60)[0] == "True\n"
    assert started.returncode == 0
    outside_a_job = start_bound()
    assert outside_a_job.communicate("end\n", timeout=60)[0] == "False\n"


def test_process_whose_starter_has_ended_ends_at_once() -> None:
    """Its parent is another process by then: here this one, which is not the starter that it was told."""
    gone = subprocess.Popen(["true"])
    identity = str(identify_process(gone.pid))
    gone.wait()
    started = start_bound(LAUNCHER_STARTER=identity)
    assert started.communicate(timeout=60)[0] == ""
    assert started.returncode == -signal.SIGKILL


@pytest.mark.parametrize("has_torch", [True, False])
def test_worker_of_a_torchrun_recognises_it_by_its_torch(tmp_path: Path, has_torch: bool) -> None:
    """A process that adopted the worker, such as init, has not loaded torch; there may be a shell in between."""
    library = tmp_path / ("libtorch_cpu.so" if has_torch else "libother.so")
    library.write_bytes(b"\0" * 4096)
    parent = (
        "import mmap, subprocess, sys\n"
        f"file = open({str(library)!r}, 'r+b')\n"
        "held = mmap.mmap(file.fileno(), 4096)\n"
        f"shell = ['sh', '-c', '\"$0\" -c \"$1\"; exit $?', sys.executable, {BOUND!r}]\n"
        "print(subprocess.run(shell, input='end', text=True, stdout=subprocess.PIPE).stdout, end='')\n"
    )
    env = os.environ | TORCHRUN_ENV
    done = subprocess.run(
        [sys.executable, "-c", parent], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    expected = "True\n" if has_torch or find_agent(os.getpid()) is not None else ""
    assert done.stdout == expected, done.stderr


def test_agent_that_is_ending_is_not_mistaken_for_the_process_that_started_it(tmp_path: Path) -> None:
    """That one may have loaded torch too, and lives on."""
    library = tmp_path / "libtorch_cpu.so"
    library.write_bytes(b"\0" * 4096)
    with library.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        ended = subprocess.Popen(["true"])
        try:
            wait_for(lambda: not is_alive(ended.pid))
            assert find_agent(ended.pid) is None
            assert find_agent(os.getpid()) == os.getpid()
        finally:
            ended.wait()


def test_orphaned_worker_ends_before_it_connects(tmp_path: Path) -> None:
    """torchrun was killed between the start of the process and its first line; it would wait for its peers for ever."""
    env = os.environ | TORCHRUN_ENV | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    script = f"{sys.executable} -m launcher recipe=mlp sink=[] >/dev/null 2>&1 & echo $!"
    shell = subprocess.run(["sh", "-c", script], env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    wait_for(lambda: not is_alive(int(shell.stdout)), within_s=60)
    assert not list(tmp_path.iterdir())
