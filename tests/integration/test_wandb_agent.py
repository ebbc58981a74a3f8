"""A real `wandb agent` starts runs of a sweep; one that W&B requeues goes on in its own run directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.jobs import make_env, read_events, read_rows, wait_for
from tests.helpers.small_job import HELD, run_launcher
from tests.helpers.wandb_server import run_server

pytestmark = [pytest.mark.slow, pytest.mark.alone]

KEY = "0123456789abcdef0123456789abcdef01234567"
JOB = [*(word for word in HELD if word != "sink=[]"), "sink=wandb", "train.duration=100000ep"]
#: The `command` of docs/sweeps.md, with this job's arguments.
SWEEP = {"command": ["${env}", sys.executable, "-m", "launcher", *JOB, "${args_no_hyphens}"]}
RUN = {"type": "run", "run_id": "abc12345", "program": "launcher", "args": {"seed": {"value": 3}}}


def test_requeued_run_of_a_sweep_continues_in_its_directory(workdir: Path) -> None:
    """Both starts have the run id that the agent sets: one directory, one run in W&B, each update once."""
    run_dir = workdir / "runs/own-abc12345"
    argv = [sys.executable, "-m", "wandb", "agent", "team/vision/s1"]
    with run_server(SWEEP, [RUN, RUN]) as server:
        env = make_env(WANDB_MODE="online", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY, HOME=str(workdir))
        agent = subprocess.Popen(argv, cwd=workdir, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            for start in (1, 2):
                wait_for(lambda start=start: bool(rows := server.rows()) and rows[-1]["generation"] == start)
                run_launcher(workdir, "stop", "own-abc12345")
            assert agent.wait(60) == 0
        finally:
            agent.kill()
            output = agent.communicate()[0].decode()
        sent = [row["update"] for row in server.rows()]
    assert [path.name for path in (workdir / "runs").iterdir()] == ["own-abc12345"], output
    assert (run_dir / "wandb-id").read_text() == "abc12345"
    updates = [row["update"] for row in read_rows(run_dir)]
    assert updates == list(range(1, len(updates) + 1))
    assert len(read_events(run_dir, "start")) == 2
    assert yaml.safe_load((run_dir / "run.yaml").read_text())["seed"] == 3
    assert sent == sorted(set(sent)), "the second start goes on where the first one ended"
