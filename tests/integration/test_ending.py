"""How jobs end: killed at any moment, stopped in any state, on a full disk; nothing of them is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from launcher.checkpoint.manifest import latest_valid
from launcher.system.processes import list_child_pids, read_cpu_seconds
from tests.helpers.jobs import (
    ENDS_WITHIN_S,
    has_trained,
    is_alive,
    list_descendants,
    make_env,
    read_events,
    restore_default_signals,
    wait_for,
)
from tests.helpers.small_job import HELD, LAUNCHER, TORCHRUN, run_launcher

pytestmark = pytest.mark.slow

MARK = "LAUNCHER_TEST_JOB"
PROCESSES = '''
import atexit
import os
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
import own

def wait_for_ever_if(name):
    """The test makes a file of this name, from which on no process comes further here."""
    while Path(name).exists():
        Path("reached").touch()
        threading.Event().wait(0.05)

fsync = os.fsync
def write_slowly(fd):
    wait_for_ever_if("slow_disk")
    fsync(fd)
os.fsync = write_slowly
if "RANK" in os.environ:
    atexit.register(wait_for_ever_if, "slow_end")

class Items(own.Noisy):
    """The test blocks it: from then on, no process gets a sample any more, and no rank comes further in training."""
    def __getitem__(self, i):
        if Path("blocked").exists():
            threading.Event().wait()
        return super().__getitem__(i)

@dataclass(frozen=True)
class Starting(own.Own):
    def dataset(self, split):
        subprocess.Popen(["sleep", "1000"])
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        return Items(203 if split == "train" else 5)
    def loss(self, model, batch):
        if not model.training:
            wait_for_ever_if("slow_validation")
        wait_for_ever_if("blocked")
        return super().loss(model, batch)
'''
JOB = [*HELD, "recipe._target_=starting.Starting", "recipe.trust=[starting,own]", "run.name=x"]
JOB += ["train.duration=100000ep", "train.validate_every=100000ep", "checkpoint.every=100000ep"]
BY_DRIVER = [*LAUNCHER, *JOB, "launch.workers=2"]
BY_TORCHRUN = [*TORCHRUN, "--nproc-per-node=2", "--max-restarts=3", "-m", "launcher", *JOB]

Start = Callable[..., "subprocess.Popen[str]"]


def list_job(folder: Path) -> list[int]:
    """The processes of the job in this folder, and all that these have started, by a variable that they inherit."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            environment = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
            if f"{MARK}={folder}".encode() in environment and is_alive(int(name)):
                found.append(int(name))
    return found


@pytest.fixture
def start(workdir: Path) -> Iterator[Start]:
    """Start a job whose recipe starts processes in turn; what is left of it is killed with the test."""
    (workdir / "starting.py").write_text(PROCESSES)
    (workdir / "tmp").mkdir()
    started: list[subprocess.Popen[str]] = []

    def start_job(argv: list[str]) -> subprocess.Popen[str]:
        env = make_env(**{MARK: str(workdir), "TMPDIR": str(workdir / "tmp")})
        pipe, prepare = subprocess.PIPE, restore_default_signals
        process = subprocess.Popen(argv, cwd=workdir, env=env, text=True, stderr=pipe, stdout=pipe, preexec_fn=prepare)  # noqa: PLW1509
        started.append(process)
        return process

    yield start_job
    for pid in list_job(workdir):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in started:
        process.communicate()


def list_temporary_files(workdir: Path) -> list[str]:
    """What is left in the temporary folder, without torch's own: the log folder of a killed torchrun, a cache."""
    return [path.name for path in (workdir / "tmp").iterdir() if not path.name.startswith("torch")]


def assert_nothing_is_left(workdir: Path) -> None:
    wait_for(lambda: not list_job(workdir), within_s=ENDS_WITHIN_S)
    wait_for(lambda: not list_temporary_files(workdir), within_s=ENDS_WITHIN_S)


def list_workers(process: subprocess.Popen[str]) -> list[int]:
    """The workers of torchrun, or of the driver's agent, which starts other programs while it imports torch."""
    children = [child for agent in find_agents(process) for child in list_child_pids(agent)]
    with suppress(OSError):
        return [child for child in children if "\0launcher\0" in Path(f"/proc/{child}/cmdline").read_text()]
    return []


def find_agents(process: subprocess.Popen[str]) -> list[int]:
    """The driver's agent, which is one of the processes that it has started, or torchrun itself."""
    candidates = [process.pid, *list_child_pids(process.pid)]
    with suppress(OSError):
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in candidates}
        return [pid for pid, command in commands.items() if "torchrun_agent" in command or "distributed.run" in command]
    return []


@pytest.mark.core
@pytest.mark.parametrize(
    ("argv", "list_started", "count"),
    [
        (BY_DRIVER, find_agents, 1),
        (BY_DRIVER, list_workers, 1),
        (BY_TORCHRUN, list_workers, 1),
        (BY_TORCHRUN, list_workers, 2),
    ],
    ids=["driver and agent", "driver and first worker", "torchrun and first worker", "torchrun and all workers"],
)
def test_job_killed_while_a_process_starts_leaves_nothing(
    start: Start, workdir: Path, argv: list[str], list_started: Callable[[subprocess.Popen[str]], list[int]], count: int
) -> None:
    """The newest process has not reached its first line when its parent is killed."""
    process = start(argv)
    while len(list_started(process)) < count:
        assert process.poll() is None
    process.kill()
    process.wait()
    assert_nothing_is_left(workdir)


def test_sigterm_ends_a_stuck_job_and_all_that_it_started(start: Start, workdir: Path) -> None:
    """No rank comes further, nor its loader: nothing can be saved, and the end of the grace time ends all."""
    process = start([*BY_DRIVER, "launch.grace_s=1", "data.num_workers=1"])
    wait_for(has_trained(workdir / "runs/x"))
    (workdir / "blocked").touch()
    wait_for((workdir / "reached").exists)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=200)
    assert not list_job(workdir), "nothing outlives the command"
    assert process.returncode == 1
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "launch.grace_s=1" in errors[0]
    assert_nothing_is_left(workdir)


@pytest.mark.parametrize("busy", ["slow_disk", "slow_validation"])
def test_sigterm_ends_a_job_that_saves_or_validates(start: Start, workdir: Path, busy: str) -> None:
    """Neither ever ends: the newest complete checkpoint is kept."""
    every = "train.validate_every=1ep" if busy == "slow_validation" else "checkpoint.every=1ep"
    process = start([*BY_DRIVER, every, "launch.grace_s=1"])
    wait_for(has_trained(workdir / "runs/x", 7))
    (workdir / busy).touch()
    wait_for((workdir / "reached").exists)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=200)
    assert not list_job(workdir), "nothing outlives the command"
    assert process.returncode == 1
    assert "launch.grace_s=1" in stderr.splitlines()[-1]
    assert (latest_valid(workdir / "runs/x/checkpoints") is None) == (busy == "slow_validation")
    assert_nothing_is_left(workdir)


def test_job_that_has_saved_succeeds_though_its_workers_do_not_leave(start: Start, workdir: Path) -> None:
    process = start([*BY_DRIVER, "launch.grace_s=1"])
    wait_for(has_trained(workdir / "runs/x"))
    (workdir / "slow_end").touch()
    process.send_signal(signal.SIGUSR1)  # has no time limit
    wait_for(lambda: read_events(workdir / "runs/x", "preempt") and (workdir / "reached").exists())
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=200)
    assert not list_job(workdir), "nothing outlives the command"
    assert process.returncode == 0, stderr
    assert stderr.splitlines()[-1].startswith("stopped after saving: ")
    assert_nothing_is_left(workdir)


def waits_for_others(pid: int) -> bool:
    """Whether a worker has imported torch and, for a while, neither computes nor wants to."""
    before = read_cpu_seconds(pid)
    threading.Event().wait(0.5)
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text() and (state, read_cpu_seconds(pid)) == ("S", before)


@pytest.mark.parametrize("trained", [False, True], ids=["rendezvous", "training"])
def test_sigterm_ends_a_node_whose_peer_has_stopped(start: Start, workdir: Path, trained: bool) -> None:
    """The second node's processes stand still before they have joined, or while both train."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = (
        start(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=3", "--rdzv-id=job"),
                *(f"--rdzv-conf=is_host={int(node == 0)}", f"--local-addr=127.0.0.{node + 2}"),
                *("-m", "launcher", *JOB, "launch.grace_s=2"),
            ]
        )
        for node in range(2)
    )
    wait_for(has_trained(workdir / "runs/x") if trained else lambda: list_workers(second))
    stopped = [second.pid, *list_descendants(second.pid)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: any(map(waits_for_others, list_workers(first))))
    below = list_descendants(first.pid)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=ENDS_WITHIN_S)
    assert first.returncode == 1
    assert not any(map(is_alive, below))
    for pid in stopped:
        os.kill(pid, signal.SIGKILL)
    assert_nothing_is_left(workdir)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_signal_to_own_torchrun_saves_first(start: Start, workdir: Path, number: signal.Signals) -> None:
    """torchrun passes it on to all processes of its workers, of which the loaders are needed to save."""
    process = start([*BY_TORCHRUN, "data.num_workers=1", "launch.grace_s=200"])
    wait_for(has_trained(workdir / "runs/x"))
    process.send_signal(number)
    process.communicate(timeout=200)
    assert [event["why"] for event in read_events(workdir / "runs/x", "preempt")] == [number.name]
    assert list((workdir / "runs/x/checkpoints").glob("*/manifest.json"))
    assert_nothing_is_left(workdir)


def test_sigterm_before_training_ends_the_job_at_once(start: Start, workdir: Path) -> None:
    process = start(BY_DRIVER)
    while not list_workers(process):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert stderr.splitlines()[-1].startswith("stopped before training: ")
    assert not (workdir / "runs/x/stop").exists()
    assert_nothing_is_left(workdir)


@pytest.fixture
def small_disk(workdir: Path) -> Iterator[Path]:
    """A file system of 2 MB; without the right to mount one, the test is skipped."""
    disk = workdir / "runs"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_disk_that_is_full_at_the_end_ends_the_job_once(workdir: Path, small_disk: Path) -> None:
    """The parameters are kept where there is room; nothing is started again."""
    filling = "with suppress(OSError):\n            Path('runs/fill').open('ab').write(bytes(1 << 20))"
    (workdir / "filling.py").write_text(
        "from contextlib import suppress\nfrom dataclasses import dataclass\nfrom pathlib import Path\nimport own\n\n"
        "@dataclass(frozen=True)\nclass Filling(own.Own):\n    def loss(self, model, batch):\n"
        f"        {filling}\n        return super().loss(model, batch)\n"
    )
    job = [*HELD, "recipe._target_=filling.Filling", "recipe.trust=[filling,own]", "run.name=x", "train.duration=2ep"]
    (workdir / "tmp").mkdir()
    ended = run_launcher(workdir, *job, "launch.workers=2", status=1, TMPDIR=str(workdir / "tmp"))
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "the disk is full" in errors[0]
    assert "restart 1" not in ended.stderr
    from safetensors.torch import load_file

    kept = errors[0].partition("the final parameters are in ")[2].partition(";")[0]
    assert len(load_file(workdir / kept)) == 4


def test_sigterm_on_a_full_disk_ends_the_job(start: Start, workdir: Path, small_disk: Path) -> None:
    """The save fails, which is told once; no second start, and no temporary file, is made."""
    process = start([*BY_DRIVER, "launch.grace_s=200"])
    wait_for(has_trained(workdir / "runs/x"))
    with suppress(OSError), (small_disk / "fill").open("ab", buffering=0) as fill:
        while True:
            fill.write(bytes(4096))
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    (error,) = (line for line in stderr.splitlines() if line.startswith("error: "))
    assert "the state at the stop is lost: " in error
    assert "the disk is full" in error
    assert "restart 1" not in stderr
    assert not list((workdir / "runs/x").rglob("*tmp-*"))
    assert_nothing_is_left(workdir)


def test_restarts_are_counted_in_memory_where_the_disk_is_full(workdir: Path, small_disk: Path) -> None:
    """A worker is killed on a full disk: the next start cannot even count itself, which is said, and is the last."""
    code = "import sys; open('runs/fill', 'wb').write(bytes(4096 * 600))"
    killing = (
        "def loss(self, model, batch):\n"
        f"        subprocess.run([sys.executable, '-c', {code!r}], stderr=subprocess.DEVNULL)\n"
        "        os.kill(os.getpid(), 9)"
    )
    (workdir / "killing.py").write_text(
        "import os, subprocess, sys\nfrom dataclasses import dataclass\nimport own\n\n"
        f"@dataclass(frozen=True)\nclass Killing(own.Own):\n    {killing}\n"
    )
    job = [*HELD, "recipe._target_=killing.Killing", "recipe.trust=[killing,own]", "run.name=x"]
    ended = run_launcher(workdir, *job, "launch.workers=2", status=1)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "runs/x cannot be written: No space left on device" in errors[0]
