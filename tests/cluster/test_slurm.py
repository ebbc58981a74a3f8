"""The scripts of slurm/, unmodified, on a real Slurm: what is trained survives whatever happens to the nodes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import environment, events, furthest, rows, training, wait_for
from slurm import Slurm
from test_main_job import HELD, RECIPE, driven

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SCRIPTS = Path(__file__).parents[2] / "slurm"
LONG = [*HELD, "train.duration=100000ep", "checkpoint.every=200ba"]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project's root, with a recipe of its own."""
    (tmp_path / "own.py").write_text(RECIPE)
    return tmp_path


def env(**more: str) -> dict[str, str]:
    """Where `python` is ours, as with an activated environment."""
    return environment(**{"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **more})


def over(slurm: Slurm, job: str) -> Callable[[], bool]:
    return lambda: slurm.state(job) in OVER


def printed(project: Path, job: str) -> str:
    return (project / f"{job}.out").read_text()


def test_two_nodes_train_what_one_process_trains(slurm: Slurm, project: Path) -> None:
    script = str(SCRIPTS / "train.sbatch")
    job = slurm.submit(script, *HELD, "train.precision=fp64", cwd=project, env=env())
    wait_for(over(slurm, job), 90)
    assert slurm.state(job) == "COMPLETED", printed(project, job)
    run_dir = project / f"runs/own-{job}"
    assert (run_dir / "done.json").exists()
    assert events(run_dir, "start")[0]["nodes"] == 2
    driven(project, *HELD, "train.precision=fp64", "run.name=one")
    assert furthest(run_dir, project / "runs/one") <= 1e-10
