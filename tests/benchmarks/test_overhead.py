"""The benchmark refuses a busy machine, and measures real jobs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from overhead import Case, Lengths, make_command, make_measurement

from tests.helpers.jobs import make_env

SCRIPT = Path(__file__).parents[2] / "benchmarks/overhead.py"
OPTIONS = argparse.Namespace(
    workers=2, recipe="perceptron", strategy="ddp", overrides=[], updates=1000, seconds=4.0, settle=5.0
)
SMALL = Case("small", ("width=16", "samples=512"), per_device=8, accumulation=2)


def note(time: float, wall_s: float, cpu_s: float, other_cpu_s: float) -> dict[str, float]:
    return {"time": time, "wall_s": wall_s, "cpu_s": cpu_s, "other_cpu_s": other_cpu_s}


def test_cpu_time_is_that_of_all_processes() -> None:
    reports = [
        {"notes": [note(103, 3, 1, 0), note(110, 10, 8, 2.0), note(120, 20, 17, 2.5)], "peak_rss_kb": 300},
        {"notes": [note(104, 3, 1, 0), note(110, 10, 7, 0), note(120, 19, 15, 0)], "peak_rss_kb": 320},
    ]
    found = make_measurement(reports, start=100.0, updates=100)
    assert found.wall_s == pytest.approx(0.10)
    assert found.cpu_s == pytest.approx((9 + 8 + 0.5) / 100)
    assert (found.start_s, found.peak_rss_kb, found.low_rss_kb) == (4.0, 320, 300)


def test_long_updates_are_fewer() -> None:
    assert Lengths.choose(0.004, OPTIONS) == Lengths({"plain": 250, "launcher": 1250, "accelerate": 250}, 1000)
    assert Lengths.choose(0.100, OPTIONS) == Lengths({"plain": 10, "launcher": 50, "accelerate": 10}, 40)


def test_every_program_trains_the_same() -> None:
    plain, accelerate, launcher = (
        make_command(SMALL, name, 7, OPTIONS) for name in ("plain", "accelerate", "launcher")
    )
    for word in ("--per-device=8", "--accumulation=2", "--updates=7", "--recipe=perceptron", "width=16"):
        assert word in plain
        assert word in accelerate
    for word in ("batch.per_device=8", "batch.accumulation=2", "train.duration=7ba", "recipe.width=16"):
        assert word in launcher
    assert not any(word.startswith(("sink", "log.")) for word in launcher)  # everything on, as by default


@pytest.mark.process
def test_busy_machine_is_refused_without_a_table(tmp_path: Path) -> None:
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "--quick", "--patience=0", "--programs", "plain", "launcher"],
            cwd=tmp_path,
            env=make_env(),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    assert done.returncode == 1
    assert done.stdout == ""
    assert "The machine was too busy, so there is no result" in done.stderr
    assert "other processes used" in done.stderr


JOB = """
import dataclasses, json, sys
from test_overhead import OPTIONS, SMALL
from overhead import run_job
print(json.dumps([dataclasses.asdict(part) for part in run_job(SMALL, sys.argv[1], 2, 10, OPTIONS)]))
"""


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("program", ["plain", "launcher"])
def test_real_job_is_measured(program: str) -> None:
    """In a process of its own, which waits for all its children."""
    folders = (SCRIPT.parents[1], SCRIPT.parent, Path(__file__).parent)
    env = make_env(PYTHONPATH=os.pathsep.join(map(str, folders)))
    done = subprocess.run([sys.executable, "-c", JOB, program], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, use = json.loads(done.stdout)
    assert found["updates"] == 10
    assert 0 < found["wall_s"] < found["start_s"]
    assert found["cpu_s"] > 0
    assert 50e3 < found["peak_rss_kb"] < 5e6
    assert use["own_s"] > 1.0  # every process of the job has been waited for
