"""The driver and its torchrun, as real processes: signals, exit statuses, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.jobs import alive, descendants, environment, events, hearing, kill_all, rows, training, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(120)]

JOB = ["recipe=mlp", "launch.workers=2", "sink=[]", "run.name=x", "batch=hold", "batch.global=64", "optimizer=sgd"]
LONG = [*JOB, "lr.base=0.01", "lr.base_batch=64", "train.duration=100000ep", "train.validate_every=100000ep"]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a driver in a folder of its own; what is left of it is killed with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*overrides: str) -> subprocess.Popen[str]:
        env = environment()
        argv = [sys.executable, "-m", "launcher", *overrides]
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(
                argv,
                cwd=tmp_path,
                env=env,
                text=True,
                stdout=pipe,
                stderr=pipe,
                start_new_session=True,
                preexec_fn=hearing,  # noqa: PLW1509 (single-threaded here)
            )
        )
        return started[-1]

    yield start
    for process in started:
        kill_all(process.pid)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops_with_status_0(
    driver: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: signal.Signals
) -> None:
    process = driver(*LONG)
    wait_for(training(tmp_path / "runs/x"))
    everyone = descendants(process.pid)
    assert len(everyone) >= 3, "the agent and two workers"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert f"{number.name}: saving at the next update" in stderr
    assert "run.name=x continues from there" in stderr
    assert not (tmp_path / "runs/x/done.json").exists()
    assert not (tmp_path / "runs/x/stop").exists(), "the next start is not asked to stop"
    assert [event["why"] for event in events(tmp_path / "runs/x", "preempt")] == [number.name]
    assert list((tmp_path / "runs/x/checkpoints").glob("*/manifest.json"))
    assert not [pid for pid in everyone if alive(pid)]


def test_a_second_interrupt_ends_at_once(driver: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = driver(*LONG)
    wait_for(training(tmp_path / "runs/x"))
    everyone = descendants(process.pid)
    for pid in everyone[1:]:
        os.kill(pid, signal.SIGSTOP)  # workers that cannot save
    process.send_signal(signal.SIGINT)
    wait_for((tmp_path / "runs/x/stop").exists)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    wait_for(lambda: not [pid for pid in everyone if alive(pid)], within_s=3)


@pytest.mark.parametrize("victim", ["driver", "agent"])
def test_nobody_outlives_a_killed_driver_or_agent(
    driver: Callable[..., subprocess.Popen[str]], tmp_path: Path, victim: str
) -> None:
    process = driver(*LONG)
    wait_for(training(tmp_path / "runs/x"))
    everyone = descendants(process.pid)
    os.kill(process.pid if victim == "driver" else everyone[0], signal.SIGKILL)
    wait_for(lambda: not [pid for pid in everyone if alive(pid)], within_s=3)
    _, stderr = process.communicate(timeout=20)
    if victim == "agent":
        assert process.returncode == 1
        assert stderr.splitlines()[-1].startswith("error: ")


def test_under_nohup_a_closed_terminal_ends_nothing(
    driver: Callable[..., subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "hearing", lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process = driver(*LONG)
    wait_for(training(tmp_path / "runs/x"))
    process.send_signal(signal.SIGHUP)
    before = len(rows(tmp_path / "runs/x"))
    wait_for(training(tmp_path / "runs/x", before + 20))
    assert process.poll() is None


def verb(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "launcher", *words]
    return subprocess.run(argv, cwd=here, capture_output=True, text=True, timeout=60, check=False)


def test_stop_asks_a_run_started_elsewhere_to_save(
    driver: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = driver(*LONG)
    wait_for(training(tmp_path / "runs/x"))
    assert f"is run by process {process.pid} on " in verb(tmp_path, "status", "x").stdout
    stopped = verb(tmp_path, "stop", "x")
    assert process.wait(timeout=20) == 0
    assert [event["why"] for event in events(tmp_path / "runs/x", "preempt")] == ["launcher stop"]
    assert "runs/x stopped: at update " in stopped.stdout
    assert "nothing saved" not in stopped.stdout
    again = verb(tmp_path, "stop", "runs/x")
    assert "is not running: at update " in again.stdout
    assert not (tmp_path / "runs/x/stop").exists()


@pytest.mark.parametrize("torchrun", [False, True])
def test_stop_now_ends_it_whoever_started_it(
    driver: Callable[..., subprocess.Popen[str]], tmp_path: Path, torchrun: bool
) -> None:
    if torchrun:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        job = [*launch, "--max-restarts=3", "-m", "launcher", *(word for word in LONG if "launch." not in word)]
        env = environment()
        process = subprocess.Popen(job, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    else:
        process = driver(*LONG)  # type: ignore[assignment]
    wait_for(training(tmp_path / "runs/x"))
    everyone = descendants(process.pid)
    assert "runs/x ended: at update " in verb(tmp_path, "stop", "x", "--now").stdout
    process.wait(timeout=20)
    wait_for(lambda: not [pid for pid in everyone if alive(pid)], within_s=3)


@pytest.mark.parametrize("words", [["stop"], ["stop", "nothing"], ["stop", "x", "y"], ["stop", "x", "--soon"]])
def test_a_wrong_stop_says_what_to_type(tmp_path: Path, words: list[str]) -> None:
    done = verb(tmp_path, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def listening(pids: list[int]) -> set[str]:
    """Return the hex addresses on which any of these processes listens, over IPv4 and IPv6."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(link) if link.is_symlink() else ""
            inodes |= {target[8:-1]} if target.startswith("socket:[") else set()
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def test_nothing_listens_beyond_the_loopback(driver: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = driver(*LONG)
    wait_for(training(tmp_path / "runs/x"))
    assert listening([process.pid, *descendants(process.pid)]) == {"0100007F"}


def own_mlp(here: Path, method: str) -> list[str]:
    """Create a recipe with one `method` replaced, and the job that trains it, with one restart."""
    (here / "own.py").write_text(
        "import os\nfrom dataclasses import dataclass\nfrom launcher.recipes.mlp import Mlp\n\n"
        f"@dataclass(frozen=True)\nclass Own(Mlp):\n    {method}\n"
    )
    own = ["recipe._target_=own.Own", "recipe.trust=[own,launcher.recipes]", "elastic.max_restarts=1"]
    return [*JOB, "lr.base=0.1", "lr.base_batch=64", *own]


def test_a_crash_loop_ends_with_its_first_error(driver: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = driver(*own_mlp(tmp_path, "def loss(self, model, batch): raise ValueError('no such thing')"))
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "own.py:7: ValueError: no such thing" in stderr.splitlines()[-1]
    assert [path.name for path in sorted((tmp_path / "runs/x/logs").glob("rank0-*.log"))] == [
        "rank0-g1.log",
        "rank0-g2.log",
    ], "one restart and no more"
    told = verb(tmp_path, "status", "x").stdout
    assert "is not running: no update finished yet; rank " in told
    assert "failed in own.py:7: ValueError: no such thing" in told


LOST = "raise ConnectionResetError('Connection reset by peer')"  # the error of a rank whose peer was killed before


@pytest.mark.parametrize(
    ("method", "word"),
    [
        ("def model(self): os.kill(os.getpid(), 9)", ""),
        (
            f"def model(self):\n        if os.environ['RANK'] == '1': {LOST}\n        os.kill(os.getpid(), 9)",
            "rank 1 failed",
        ),
    ],
)
def test_workers_that_are_killed_without_a_word_are_not_started_for_ever(
    driver: Callable[..., subprocess.Popen[str]], tmp_path: Path, method: str, word: str
) -> None:
    process = driver(*own_mlp(tmp_path, method))
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "restart 1: a worker was killed" in stderr
    assert stderr.splitlines()[-1].startswith("error: the workers were killed repeatedly")
    assert word in stderr.splitlines()[-1]


WRONG = [
    (["recipe=resnett"], "resnet"),
    (["batch.per_devise=3"], "batch.per_device"),
    (["batch.per_device=many"], "batch.per_device"),
    (["batch=hold", "batch.global=1", "launch.workers=2"], "batch.global"),
    (["batch.global=99999999"], "batch.global"),
    (["recipe.data=nowhere"], "nowhere"),
    (["recipe.data=empty"], "empty"),
    (["recipe=own", "recipe._target_=nowhere.Own", "recipe.trust=[nowhere]"], "nowhere"),
    (["run.name=../x"], "run.name"),
    (["elastic.min_workers=3", "launch.workers=2"], "elastic.min_workers"),
    (["train.duration=-1ep"], "train.duration"),
    (["lr.base=nan"], "lr.base"),
    (["checkpoint.keep=0"], "checkpoint.keep"),
    (["resume=must"], "resume"),
    (["optimizer=rprop"], "rprop"),
    (["model.init=nowhere.safetensors"], "nowhere.safetensors"),
    (["model.init=nowhere.safetensors", "run.dir=a/b/c"], "nowhere.safetensors"),
    (["launch.backend=nccl", "train.device=cpu"], "launch.backend"),
]


@pytest.mark.parametrize(("overrides", "named"), WRONG, ids=[" ".join(overrides) for overrides, _ in WRONG])
def test_a_wrong_request_is_one_line_status_2_and_leaves_nothing(
    driver: Callable[..., subprocess.Popen[str]], tmp_path: Path, overrides: list[str], named: str
) -> None:
    (tmp_path / "empty").mkdir()
    process = driver("recipe=resnet", *overrides)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert named in last
    assert not [line for line in stderr.splitlines()[:-1] if not line.startswith("note: ")]
    assert stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_dry_run_prints_the_command_and_starts_nothing(
    driver: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = driver("recipe=mlp", "launch.workers=2", "launch.dry_run=true")
    stdout, _ = process.communicate(timeout=30)
    assert "-m launcher.launch.torchrun_agent" in stdout
    assert "--nproc-per-node=2" in stdout
    assert process.returncode == 0
    assert not list(tmp_path.iterdir())


def test_a_sweep_inside_torchrun_is_refused_with_what_to_type(tmp_path: Path) -> None:
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "launcher", "-m", "recipe=mlp", "seed=0,1"]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "launcher -m" in done.stderr
    assert not list(tmp_path.iterdir())
