"""Sweeps of real jobs: two parallel points, each on its share of the machine, and points chosen by Optuna."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helpers.jobs import has_trained, make_env, read_events, read_rows, restore_default_signals, wait_for
from tests.helpers.small_job import HELD, LAUNCHER, run_launcher

pytestmark = pytest.mark.slow
takes_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two points at a time take two cores")

SWEEP = ["-m", *HELD, "run.name=s", "sweep.max_parallel=2"]


def start_and_end(run_dir: Path) -> tuple[float, float]:
    """Return when the job of a point started and finished, in UNIX seconds."""
    return tuple((run_dir / name).stat().st_mtime for name in ("run.yaml", "done.json"))  # type: ignore[return-value]


@pytest.mark.core
def test_sweep_runs_one_fresh_job_per_point(workdir: Path) -> None:
    own = ["-m", *HELD, "train.duration=1ep", "run.name=s"]
    completed = run_launcher(workdir, *own, "seed=0,1")
    assert all((workdir / f"runs/s/{point}/done.json").exists() for point in (0, 1))
    assert "time-optimal: point" in completed.stdout
    again = run_launcher(workdir, *own, "seed=0,1,2")
    starts = [len(read_events(workdir / f"runs/s/{point}", "start")) for point in (0, 1, 2)]
    assert starts == [1, 1, 1], "finished points are not run again"
    assert again.stdout.count("is complete") == 2


@takes_two_cores
def test_two_points_train_at_a_time(workdir: Path) -> None:
    """Three points, two at a time; one fails, which is shown and does not stop the others."""
    completed = run_launcher(workdir, *SWEEP, "+recipe.fail_on=-1,-2,0", "elastic.max_restarts=0", status=1)
    finished = [line for line in completed.stderr.splitlines() if line.startswith("point ")]
    assert sorted(re.sub(r"[\d.]+ s", "- s", line)[:24] for line in finished) == [
        "point 0 finished, - s, v",
        "point 1 finished, - s, v",
        "point 2 failed (1), erro",
    ]
    assert any("boom" in line and line.endswith("(log: runs/s/2.log)") for line in finished)
    (from_0, to_0), (from_1, to_1) = (start_and_end(workdir / f"runs/s/{point}") for point in (0, 1))
    assert max(from_0, from_1) < min(to_0, to_1), "they ran beside one another"
    assert (workdir / "runs/s/2/run.yaml").stat().st_mtime > min(to_0, to_1), "the third one waited for a slot"
    assert "each on " in completed.stderr
    assert "point 0: " in (workdir / "runs/s/0.log").read_text()
    table = completed.stdout.splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["0", "1", "2"]


@takes_two_cores
def test_ctrl_c_saves_all_points_for_a_resume(workdir: Path) -> None:
    """Send Ctrl-C once, as in a terminal; the sweep forwards it to its points."""
    arguments = [*SWEEP, "seed=0,1,2", "train.duration=40ep", "checkpoint.every=null"]
    slow = make_env(LAUNCHER_TEST_FAULTS="1", FAULT="slow@forward:0:0")  # neither finishes before the other trains
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*LAUNCHER, *arguments]
    with subprocess.Popen(command, cwd=workdir, env=slow, preexec_fn=restore_default_signals, **both) as job:  # noqa: PLW1509
        wait_for(lambda: all(has_trained(workdir / f"runs/s/{point}")() for point in (0, 1)))
        job.send_signal(signal.SIGINT)
        out, err = (stream.decode() for stream in job.communicate(timeout=200))
    assert job.returncode == 0, err
    assert "SIGINT: all points save at the next update, then stop" in err
    assert [line.split()[3] for line in out.splitlines()[2:5]] == ["stopped", "stopped", "not"]
    assert not (workdir / "runs/s/2").exists()
    run_launcher(workdir, *arguments)
    for point in (0, 1, 2):
        updates = [row["update"] for row in read_rows(workdir / f"runs/s/{point}")]
        assert updates == list(range(1, len(updates) + 1)), "nothing is lost or repeated"
        assert (workdir / f"runs/s/{point}/done.json").exists()


@takes_two_cores
def test_optuna_search_learns_from_points_and_continues(workdir: Path) -> None:
    """Search over a learning rate and a choice that can fail: a failure counts as a trial. More trials continue it."""
    pytest.importorskip("optuna")
    own = [word for word in SWEEP if not word.startswith("lr.base=")]
    own += ["lr.base=tag(log,interval(0.001,1))", "+recipe.fail_on=-1,0", "elastic.max_restarts=0"]
    own += ["sweep.metric=val/loss", "train.duration=1ep"]
    run_launcher(workdir, *own, "sweep.trials=2", status=1)
    completed = run_launcher(workdir, *own, "sweep.trials=4", status=1)
    runs = [yaml.safe_load((workdir / f"runs/s/{point}/run.yaml").read_text()) for point in range(4)]
    assert len({run["lr"]["base"] for run in runs}) == 4
    assert all(0.001 <= run["lr"]["base"] <= 1 for run in runs)
    assert [len(read_events(workdir / f"runs/s/{point}", "start")) for point in range(4)] == [1, 1, 1, 1]
    well = [point for point, run in enumerate(runs) if run["recipe"]["fail_on"] == -1]
    assert 0 < len(well) < 4
    shown = [line.split() for line in completed.stdout.splitlines()[2:6]]
    assert [int(line[0]) for line in shown if line[3] != "failed"] == well
    losses = {point: read_rows(workdir / f"runs/s/{point}")[-1]["val/loss"] for point in well}
    best = min(well, key=lambda point: losses[point])
    assert f"best of 4 points: point {best}, val/loss {losses[best]:.4g}: lr.base=" in completed.stderr
    changed = run_launcher(workdir, *own, "sweep.trials=5", "train.clip_norm=1", status=2)
    assert "runs/s holds a search with a different train.clip_norm: type another run.name=" in changed.stderr
