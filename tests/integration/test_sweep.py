"""Sweeps of real jobs: two parallel points, each on its share of the machine, and points chosen by Optuna."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_main_job import HELD, RECIPE, driven

from tests.helpers.jobs import environment, events, rows, training, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(180),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two points at a time take two cores"),
]

SWEEP = ["-m", *HELD, "run.name=s", "sweep.max_parallel=2"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(RECIPE)
    return tmp_path


def times(run_dir: Path) -> tuple[float, float]:
    """Return when the job of a point started and finished, in UNIX seconds."""
    return tuple((run_dir / name).stat().st_mtime for name in ("run.yaml", "done.json"))  # type: ignore[return-value]


def test_two_points_train_at_a_time_and_no_more(here: Path) -> None:
    """Three points on two lanes; one fails, which is shown and does not stop the others."""
    done = driven(here, *SWEEP, "+recipe.fail_on=-1,-2,0", "elastic.max_restarts=0", status=1)
    told = [line for line in done.stderr.splitlines() if line.startswith("point ")]
    assert sorted(re.sub(r"[\d.]+ s", "- s", line)[:24] for line in told) == [
        "point 0 finished, - s, v",
        "point 1 finished, - s, v",
        "point 2 failed (1), erro",
    ]
    assert any("boom" in line and line.endswith("(log: runs/s/2.log)") for line in told)
    (from_0, to_0), (from_1, to_1) = (times(here / f"runs/s/{point}") for point in (0, 1))
    assert max(from_0, from_1) < min(to_0, to_1), "they ran beside one another"
    assert (here / "runs/s/2/run.yaml").stat().st_mtime > min(to_0, to_1), "the third one waited for a lane"
    assert "each on " in done.stderr
    assert "point 0: " in (here / "runs/s/0.log").read_text()
    table = done.stdout.splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["0", "1", "2"]


def heeds_ctrl_c() -> None:
    """Restore the default signal handling of a terminal; scripts start background processes with it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_saves_all_points_that_train_and_the_same_command_goes_on(here: Path) -> None:
    """Send Ctrl-C once, as in a terminal; the sweep forwards it to its points."""
    argv = [sys.executable, "-m", "launcher", *SWEEP, "seed=0,1,2", "train.duration=12ep", "checkpoint.every=null"]
    slow = environment(LAUNCHER_TEST_FAULTS="1", FAULT="slow@forward:0:0")  # neither finishes before the other trains
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, cwd=here, env=slow, preexec_fn=heeds_ctrl_c, **both) as job:  # noqa: PLW1509
        wait_for(lambda: all(training(here / f"runs/s/{point}")() for point in (0, 1)))
        job.send_signal(signal.SIGINT)
        out, err = (stream.decode() for stream in job.communicate(timeout=60))
    assert job.returncode == 0, err
    assert "SIGINT: all points save at the next update, then stop" in err
    assert [line.split()[3] for line in out.splitlines()[2:5]] == ["stopped", "stopped", "not"]
    assert not (here / "runs/s/2").exists()
    driven(here, *argv[3:])
    for point in (0, 1, 2):
        updates = [row["update"] for row in rows(here / f"runs/s/{point}")]
        assert updates == list(range(1, len(updates) + 1)), "nothing is lost or repeated"
        assert (here / f"runs/s/{point}/done.json").exists()


def test_optuna_chooses_points_by_what_came_of_them_and_goes_on(here: Path) -> None:
    """Search over a learning rate and a choice that can fail: a failure counts as a trial. More trials continue it."""
    pytest.importorskip("optuna")
    own = [word for word in SWEEP if not word.startswith("lr.base=")]
    own += ["lr.base=tag(log,interval(0.001,1))", "+recipe.fail_on=-1,0", "elastic.max_restarts=0"]
    own += ["sweep.metric=val/loss", "train.duration=1ep"]
    driven(here, *own, "sweep.trials=2", status=1)
    done = driven(here, *own, "sweep.trials=4", status=1)
    runs = [yaml.safe_load((here / f"runs/s/{point}/run.yaml").read_text()) for point in range(4)]
    assert len({run["lr"]["base"] for run in runs}) == 4
    assert all(0.001 <= run["lr"]["base"] <= 1 for run in runs)
    assert [len(events(here / f"runs/s/{point}", "start")) for point in range(4)] == [1, 1, 1, 1]
    well = [point for point, run in enumerate(runs) if run["recipe"]["fail_on"] == -1]
    assert 0 < len(well) < 4
    shown = [line.split() for line in done.stdout.splitlines()[2:6]]
    assert [int(line[0]) for line in shown if line[3] != "failed"] == well
    losses = {point: rows(here / f"runs/s/{point}")[-1]["val/loss"] for point in well}
    best = min(well, key=lambda point: losses[point])
    assert f"best of 4 points: point {best}, val/loss {losses[best]:.4g}: lr.base=" in done.stderr
    changed = driven(here, *own, "sweep.trials=5", "train.clip_norm=1", status=2)
    assert "runs/s holds a search with a different train.clip_norm: type another run.name=" in changed.stderr
