"""`launcher doctor` as a user runs it on a new machine: a real job at its end, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

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

DOCTOR = [sys.executable, "-m", "launcher", "doctor"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The current folder, next to the folder for temporary files."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def make_doctor_env(here: Path, **more: str) -> dict[str, str]:
    return make_env(TMPDIR=str(here.parent / "tmp"), **more)


def run_doctor(here: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    completed = subprocess.run(
        [*DOCTOR, *arguments],
        cwd=here,
        env=make_doctor_env(here, **more),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert list((here.parent / "tmp").iterdir()) == [], "nothing is left of the job"
    return completed


def by_name(completed: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return {check["name"]: check for check in json.loads(completed.stdout)["checks"]}


@pytest.mark.core
def test_working_machine_passes_and_nothing_is_left(here: Path) -> None:
    completed = run_doctor(here, "format=json")
    found = by_name(completed)
    assert [check for check in found.values() if not check["ok"]] == []
    assert completed.returncode == 0
    assert json.loads(completed.stdout)["ok"] is True
    assert found["smoke job"]["detail"].startswith("2 workers trained 8 updates in ")
    assert {"python", "packages", "torch", "gpus", "backends", "loopback", "host name", "shm", "folder"} <= set(found)
    assert {"deepspeed", "optuna", "submitit", "tensorboard", "wandb", "slurm"} <= set(found)
    assert list(here.iterdir()) == []
    table = completed.stderr.splitlines()
    assert table[-1] == "all required checks passed"
    assert max(map(len, table)) <= 80


def test_broken_parts_are_named_with_a_fix(here: Path) -> None:
    """Too many threads for the cores, and a user's file that shadows torch, which the job elsewhere cannot see."""
    (here / "torch.py").write_text("import no_such_module")
    completed = run_doctor(here, OMP_NUM_THREADS=str(len(os.sched_getaffinity(0)) + 1))
    assert (completed.returncode, completed.stderr) == (1, "")
    lines = completed.stdout.splitlines()
    failed = [line.split(maxsplit=1)[1] for line in lines if line.startswith("FAIL ")]
    assert [line.split()[0] for line in failed[:2]] == ["torch", "cores"]
    assert "No module named 'no_such_module'" in failed[0]
    fixes = [line.removeprefix("     fix:").strip() for line in lines if line.startswith("     fix:")]
    assert fixes[0] == "rename torch.py in this folder: it shadows torch"
    assert fixes[1].startswith("unset OMP_NUM_THREADS, or export OMP_NUM_THREADS=")
    assert [path.name for path in here.iterdir()] == ["torch.py"]


def test_failing_job_is_shown_by_its_error_line(here: Path) -> None:
    """A system library that fails in the workers only, as in a broken installation."""
    (here.parent / "broken" / "safetensors").mkdir(parents=True)
    (here.parent / "broken" / "safetensors" / "__init__.py").write_text("raise ImportError('libfoo.so: not found')")
    completed = run_doctor(here, "format=json", PYTHONPATH=str(here.parent / "broken"))
    assert completed.returncode == 1
    wrong = [check for check in by_name(completed).values() if not check["ok"]]
    assert [check["name"] for check in wrong] == ["smoke job"]
    assert "ImportError: libfoo.so: not found" in wrong[0]["detail"]
    assert wrong[0]["fix"].startswith("launcher recipe=mlp launch.workers=2 'sink=[]'")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_doctor_and_its_job(here: Path, number: signal.Signals) -> None:
    null = subprocess.DEVNULL
    process = subprocess.Popen(
        DOCTOR,
        cwd=here,
        env=make_doctor_env(here),
        stdout=null,
        stderr=null,
        preexec_fn=restore_default_signals,  # noqa: PLW1509 (single-threaded here)
    )
    try:
        wait_for(lambda: len(list_descendants(process.pid)) >= 4)  # the driver, its agent and two workers
        processes = list_descendants(process.pid)
        process.send_signal(number)
        assert process.wait(timeout=200) == 130
        wait_for(lambda: not [pid for pid in processes if is_alive(pid)], within_s=ENDS_WITHIN_S)
        assert list((here.parent / "tmp").iterdir()) == []
        assert list(here.iterdir()) == []
    finally:
        kill_all(process.pid)
        process.wait()
