"""The measuring processes: what terminates them, what is left of them, and how they are started."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.jobs import (
    ENDS_WITHIN_S,
    is_alive,
    kill_all,
    list_descendants,
    make_env,
    restore_default_signals,
    wait_for,
)

pytestmark = pytest.mark.slow

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
MEASURED = ["recipe._target_=watched.Watched", "recipe.trust=[watched]", "tune.sizes=[8,16]", "tune.budget_s=0.5"]
TUNE = ["-m", "launcher", "tune", "recipe=mlp", "launch.workers=2", *MEASURED]
AUTO = ["recipe=mlp", "sink=[]", "batch.per_device=auto", "train.duration=2ba", *MEASURED]
WATCHED = '''
import os, signal, threading
from dataclasses import dataclass
from pathlib import Path
from launcher.recipes.mlp import Mlp


@dataclass(frozen=True)
class Watched(Mlp):
    """Every process that computes a loss leaves its rank, its pid and its command line."""

    seen: str = ""
    then: str = ""

    def loss(self, model, batch):
        rank, pid = os.environ["RANK"], os.getpid()
        (Path(self.seen) / f"{rank}-{pid}").write_bytes(Path("/proc/self/cmdline").read_bytes())
        if self.then == "killed" and rank == "1":
            os.kill(pid, signal.SIGKILL)
        if self.then == "stuck":
            threading.Event().wait()
        return super().loss(model, batch)
'''

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    (tmp_path / "seen").mkdir()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "watched.py").write_text(WATCHED)
    return tmp_path / "seen"


@pytest.fixture
def start(seen: Path) -> Iterator[Start]:
    """Start Python in a folder of its own; what is left of it is killed with the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(*argv: str, **env: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, *argv, f"+recipe.seen={seen}"],
                cwd=seen.parent,
                env=make_env(TMPDIR=str(seen.parent / "tmp"), **env),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                preexec_fn=restore_default_signals,  # noqa: PLW1509 (single-threaded here)
            )
        )
        return started[-1]

    yield begin
    for process in started:
        for pid in (process.pid, *pids(seen)):
            kill_all(pid)
        process.communicate()


def pids(seen: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in seen.iterdir()]


def test_killed_rank_is_named_and_nothing_is_left(start: Start, seen: Path) -> None:
    process = start(*TUNE, "+recipe.then=killed")
    stdout, stderr = process.communicate(timeout=2000)
    assert (process.returncode, stdout) == (1, "")
    assert stderr.splitlines()[-1] == (
        "error: rank 1 was killed by SIGKILL: out of memory? (while measuring per_device=8)"
    )
    assert len(pids(seen)) == 2, "it is not started again"
    assert not [pid for pid in pids(seen) if is_alive(pid)]
    assert not list((seen.parent / "tmp").glob("launcher-*"))


def test_killed_sidecar_is_named_and_ends_the_job(start: Start, seen: Path) -> None:
    process = start(*TORCHRUN, "-m", "launcher", *AUTO, "+recipe.then=killed")
    _, stderr = process.communicate(timeout=2000)
    assert process.returncode == 1
    assert [line for line in stderr.splitlines() if line.startswith("error: ")] == [
        "error: rank 1 was killed by SIGKILL: out of memory? (while measuring per_device=8)"
    ]
    assert not [pid for pid in pids(seen) if is_alive(pid)]
    assert not list((seen.parent / "tmp").glob("launcher-*"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_rank_outlives_its_driver(start: Start, seen: Path, number: signal.Signals) -> None:
    process = start(*TUNE, "+recipe.then=stuck")
    wait_for(lambda: len(pids(seen)) == 2)
    below = list_descendants(process.pid)
    assert set(pids(seen)) < set(below)
    process.send_signal(number)
    process.wait(timeout=200)
    wait_for(lambda: not [pid for pid in below if is_alive(pid)], within_s=ENDS_WITHIN_S)
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert not list((seen.parent / "tmp").glob("launcher-*"))


@pytest.mark.parametrize("starts", [["-m", "launcher", "launch.workers=2"], [*TORCHRUN, "-m", "launcher"]])
def test_sigterm_while_a_job_measures_its_batch(start: Start, seen: Path, starts: list[str]) -> None:
    process = start(*starts, *AUTO, "+recipe.then=stuck")
    wait_for(lambda: len(pids(seen)) == 2)
    below = list_descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=200)
    wait_for(lambda: not [pid for pid in below if is_alive(pid)], within_s=ENDS_WITHIN_S)
    by_driver = starts[1] == "launcher"
    assert process.returncode == (130 if by_driver else 1), stderr
    assert stderr.splitlines()[-1].startswith("stopped while batch sizes were measured: ") or not by_driver
    wait_for(lambda: not list((seen.parent / "tmp").glob("launcher-*")), within_s=ENDS_WITHIN_S)
    assert not (seen.parent / "runs").exists(), "no run was begun"


@pytest.mark.parametrize(("threads", "new_process"), [("1", False), ("2", True)])
def test_sidecar_is_forked_only_without_threads(start: Start, seen: Path, threads: str, new_process: bool) -> None:
    process = start(*TORCHRUN, "-m", "launcher", *AUTO, OMP_NUM_THREADS=threads)
    _, stderr = process.communicate(timeout=2000)
    assert process.returncode == 0, stderr
    for rank in "01":
        commands = [path.read_bytes().split(b"\0") for path in seen.glob(f"{rank}-*")]
        assert len(commands) == 2, "one process that measured, and the worker"
        assert sum(b"probe" in words for words in commands) == new_process
