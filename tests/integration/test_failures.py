"""Errors of a job: reported once, as the last line and as an event, and never repeated for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import read_events
from tests.helpers.small_job import HELD, TORCHRUN, run_command, run_launcher

pytestmark = pytest.mark.slow


def test_three_nans_in_a_row_end_the_job(workdir: Path) -> None:
    fault = "nan@forward:1:5,nan@forward:1:6,nan@forward:1:7"
    job = [*HELD, "launch.workers=2", "run.name=n"]
    completed = run_launcher(workdir, *job, status=1, LAUNCHER_TEST_FAULTS="1", FAULT=fault)
    assert "3 updates in a row were not finite" in completed.stderr.splitlines()[-1]
    assert len(read_events(workdir / "runs/n", "start")) == 1, "it is not restarted"


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.core)])
def test_first_error_is_the_last_line_and_logged(workdir: Path, rank: int) -> None:
    """For any rank: rank 0 writes the events, but only knows that the failed rank is gone."""
    failing = [f"+recipe.fail_on={rank}", "elastic.max_restarts=1"]
    completed = run_launcher(workdir, *HELD, *failing, "launch.workers=2", "run.name=f", status=1)
    last = completed.stderr.splitlines()[-1]
    assert last.startswith(f"error: rank {rank} failed in own.py:")
    assert "RuntimeError: boom" in last
    assert "Traceback" not in completed.stderr
    written = read_events(workdir / "runs/f", "error")
    assert [(one["rank"], one["generation"], one["type"], one["message"]) for one in written] == [
        (rank, 1, "RuntimeError", "boom"),
        (rank, 2, "RuntimeError", "boom"),
    ]
    assert all(one["where"].startswith("own.py:") and (workdir / one["log"]).exists() for one in written)


def error_lines(completed: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in (completed.stdout + completed.stderr).splitlines() if line.startswith("error: ")]


def test_error_under_own_torchrun_is_reported_once(workdir: Path) -> None:
    argv = [*TORCHRUN, "--nproc-per-node=2", "--max-restarts=1", "-m", "launcher", *HELD, "run.name=t"]
    wrong = run_command([*argv, "batch.per_device=-1"], workdir, status=1)
    assert len(error_lines(wrong)) == 1, "also when torchrun tries again"
    failed = run_command([*argv, "+recipe.fail_on=1"], workdir, status=1, LOGLEVEL="ERROR")
    first, second = error_lines(failed)
    assert first.startswith("error: rank 1 failed in own.py:")
    assert second.startswith("error: rank 1 failed in own.py:"), "once for each start, and never a consequence"
    written = read_events(workdir / "runs/t", "error")
    assert [(one["rank"], one["generation"]) for one in written] == [(1, 1), (1, 2)]


def make_mlp_job(folder: Path, method: str) -> list[str]:
    """Write a recipe with one `method` replaced, and return the job that trains it, with one restart."""
    (folder / "own.py").write_text(
        "import os\nfrom dataclasses import dataclass\nfrom launcher.recipes.mlp import Mlp\n\n"
        f"@dataclass(frozen=True)\nclass Own(Mlp):\n    {method}\n"
    )
    job = ["recipe=mlp", "launch.workers=2", "sink=[]", "run.name=x", "batch=hold", "batch.global=64"]
    job += ["optimizer=sgd", "lr.base=0.1", "lr.base_batch=64"]
    return [*job, "recipe._target_=own.Own", "recipe.trust=[own,launcher.recipes]", "elastic.max_restarts=1"]


def test_crash_loop_ends_with_its_first_error(tmp_path: Path) -> None:
    job = make_mlp_job(tmp_path, "def loss(self, model, batch): raise ValueError('no such thing')")
    completed = run_launcher(tmp_path, *job, "elastic.max_restarts=3", status=1)
    assert "own.py:7: ValueError: no such thing" in completed.stderr.splitlines()[-1]
    assert [path.name for path in sorted((tmp_path / "runs/x/logs").glob("rank0-*.log"))] == [
        "rank0-g1.log",
        "rank0-g2.log",
    ], "one restart and no more"
    shown = run_launcher(tmp_path, "status", "x").stdout
    assert "is not running: no update finished yet; rank " in shown
    assert "failed in own.py:7: ValueError: no such thing" in shown


LOST = "raise ConnectionResetError('Connection reset by peer')"  # the error of a rank whose peer was killed before

OF_RANK_0 = "if os.environ['RANK'] == '0': return super().loss(model, batch)"


@pytest.mark.parametrize(
    ("method", "reported"),
    [
        (
            f"def model(self):\n        if os.environ['RANK'] == '1': {LOST}\n        os.kill(os.getpid(), 9)",
            "rank 0 was killed by SIGKILL: out of memory?",
        ),
        (
            f"def loss(self, model, batch):\n        {OF_RANK_0}\n        print('no such drive', flush=True)\n"
            "        os._exit(3)",
            'rank 1 exited with code 3 without an error message; its log ends with "no such drive"',
        ),
        ("def loss(self, model, batch): raise SystemExit('no such drive')", "own.py:7: SystemExit: no such drive"),
    ],
    ids=["killed", "os._exit", "sys.exit"],
)
def test_workers_that_end_themselves_are_named(tmp_path: Path, method: str, reported: str) -> None:
    if "_exit(3)" in method:
        method = method.replace(
            "print", "if os.environ['RANK'] == '0': return super().loss(model, batch)\n        print"
        )
    completed = run_launcher(tmp_path, *make_mlp_job(tmp_path, method), status=1)
    first, *_, last = completed.stderr.splitlines()
    assert first.startswith("restart 1: ")
    assert last.startswith("error: ")
    assert reported in first
    assert reported in last


def test_batchnorm_with_one_sample_is_refused_before_training(tmp_path: Path) -> None:
    job = ["recipe=resnet", "batch.global=1436", "batch.per_device=718", "sink=[]", "lr.base=0.01", "run.name=b"]
    refused = run_launcher(tmp_path, *job, status=2)
    assert "BatchNorm layer" in refused.stderr
    assert not list(tmp_path.iterdir()), "a refused request leaves nothing behind"


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

#: Runs each command line in a fork and a folder of its own, after a dry run that imports what they need.
FORKS = """
import json, os, sys
from pathlib import Path
from launcher.cli.main import main

assert main(["recipe=resnet", "launch.dry_run=true"]) == 0
for number, arguments in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if not child:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
        os.chdir(str(number))
        status = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    Path(f"{number}.status").write_text(str(status))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the output of each wrong request, and the folder in which it ran, by its number."""
    folder = tmp_path_factory.mktemp("refusals")
    for number in range(len(WRONG)):
        (folder / str(number) / "empty").mkdir(parents=True)
    requests = json.dumps([["recipe=resnet", *overrides] for overrides, _ in WRONG])
    run_command([sys.executable, "-c", FORKS, requests], folder)
    return folder


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[" ".join(overrides) for overrides, _ in WRONG])
def test_wrong_request_is_refused_in_one_line(refusals: Path, number: int) -> None:
    stderr = (refusals / f"{number}.stderr").read_text()
    assert (refusals / f"{number}.status").read_text() == "2", stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert WRONG[number][1] in last
    assert not [line for line in stderr.splitlines()[:-1] if not line.startswith("note: ")]
    assert (refusals / f"{number}.stdout").read_text() == ""
    assert [path.name for path in (refusals / str(number)).iterdir()] == ["empty"]


def test_dry_run_prints_the_command_and_starts_nothing(tmp_path: Path) -> None:
    stdout = run_launcher(tmp_path, "recipe=mlp", "launch.workers=2", "launch.dry_run=true").stdout
    assert "-m launcher.launch.torchrun_agent" in stdout
    assert "--nproc-per-node=2" in stdout
    assert not list(tmp_path.iterdir())


def test_sweep_inside_torchrun_is_refused(tmp_path: Path) -> None:
    rank: dict[str, Any] = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    refused = run_launcher(tmp_path, "-m", "recipe=mlp", "seed=0,1", status=2, **rank)
    assert refused.stderr.startswith("error: ")
    assert "launcher -m" in refused.stderr, "what to type instead"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["stop"], ["stop", "nothing"], ["stop", "x", "y"], ["stop", "x", "--soon"]])
def test_wrong_stop_is_refused(tmp_path: Path, words: list[str]) -> None:
    assert run_launcher(tmp_path, *words, status=2).stderr.startswith("error: ")
