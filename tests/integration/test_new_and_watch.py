"""A custom recipe from `launcher new`, trained unchanged; `launcher watch` beside real runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.jobs import (
    has_trained,
    kill_all,
    list_descendants,
    make_env,
    read_events,
    read_rows,
    restore_default_signals,
    wait_for,
)
from tests.helpers.small_job import LAUNCHER

pytestmark = pytest.mark.slow

LONG = ["recipe=mlp", "launch.workers=2", "sink=[]", "run.name=x", "batch=hold", "batch.global=64", "optimizer=sgd"]
LONG += ["lr.base=0.01", "lr.base_batch=64", "train.duration=100000ep", "train.validate_every=100000ep"]
LONG += ["checkpoint.every=20ba"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder"
    folder.mkdir()
    return folder


@pytest.fixture
def start(here: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command with its output in a file or pipe; what is left is killed with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, out: Path | None = None) -> subprocess.Popen[str]:
        with (out or Path(os.devnull)).open("w") as file:
            process = subprocess.Popen(
                [*LAUNCHER, *words],
                cwd=here,
                env=make_env(),
                text=True,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=restore_default_signals,  # noqa: PLW1509 (single-threaded here)
            )
        started.append(process)
        return process

    yield start
    for process in started:
        kill_all(process.pid)
        process.wait()


def run_printed(here: Path, line: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a printed command in a shell; `launcher` is the one of this Python."""
    assert line.startswith("launcher "), line
    command = f"{shlex.join(LAUNCHER)} {line.removeprefix('launcher ')} {shlex.join(more)}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=here, env=make_env(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_commands_that_new_prints_run_unchanged(here: Path) -> None:
    """Train, verify and tune, without editing, in a folder with a space in its path."""
    printed = run_printed(here, "launcher new my_disc").stdout
    train, verify, tune = (line for line in printed.splitlines() if line.startswith("launcher "))
    output = run_printed(here, train).stdout
    assert "MyDisc on 2 workers" in output
    [done] = here.glob("runs/*/done.json")
    facts = json.loads(done.read_text())
    assert facts["samples"] == 40_000
    assert facts["metrics"]["val/accuracy"] > 0.9, "it learns something"
    assert "loss" not in [event["kind"] for event in read_events(done.parent, "alarm")], "its loss is a sum"
    verdict = json.loads(run_printed(here, verify, "format=json").stdout)
    assert verdict["equal"] is True
    assert verdict["breakers"] == []
    table = run_printed(here, tune, "tune.sizes=[16,32]", "tune.budget_s=10", "format=json").stdout
    assert {point["per_device"] for point in json.loads(table)["points"]} == {16, 32}
    again = subprocess.run([*LAUNCHER, "new", "my_disc"], cwd=here, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: my_disc is taken: my_disc.py already exists")


def test_watch_follows_a_run_to_its_stop(start: Callable[..., subprocess.Popen[str]], here: Path) -> None:
    run, out = here / "runs/x", here / "watched.txt"
    driver = start(*LONG, "elastic.max_restarts=1")
    wait_for((run / "run.yaml").exists)
    assert not read_rows(run), "training has not begun"
    watching = start("watch", "x", out=out)
    wait_for(lambda: "waiting for it to start" in out.read_text())
    wait_for(has_trained(run, 60))
    wait_for(lambda: "Mlp on 2 workers\n" in out.read_text())
    before = len(read_rows(run))
    workers = list_descendants(driver.pid)[1:]
    os.kill(workers[-1], signal.SIGKILL)
    wait_for(lambda: "Mlp on 2 workers · start 2\n" in out.read_text())
    wait_for(has_trained(run, before + 20))
    assert watching.poll() is None
    stopped = subprocess.run([*LAUNCHER, "stop", "x"], cwd=here, capture_output=True, text=True, check=False)
    assert stopped.returncode == 0, stopped.stderr
    assert driver.wait(timeout=200) == 0, "watching does not delay it"
    assert watching.wait(timeout=200) == 0
    text = out.read_text()
    resumed, end = text[text.index("start 2") :], text[text.rindex("stopped at update") :]
    assert re.search(r"resumed +update-\d+ at update \d+ · [\d,]+ samples are run again", resumed)
    [stop] = read_events(run, "preempt")
    assert f"stopped at update {stop['update']:,}, {stop['samples']:,} samples · launcher stop" in text
    assert "time per update: " in end, "the closing figures"
    assert end.splitlines()[-1] == f"runs/x is not running: at update {stop['update']:,}, {stop['samples']:,} samples"
    assert max(map(len, text.splitlines()[1:-1])) <= 80
    after = subprocess.run([*LAUNCHER, "watch", "x"], cwd=here, capture_output=True, text=True, check=False)
    assert (after.returncode, after.stdout) == (0, end.splitlines()[-1] + "\n")


def test_watch_ends_with_ctrl_c_or_its_run(start: Callable[..., subprocess.Popen[str]], here: Path) -> None:
    run = here / "runs/x"
    driver = start(*LONG)
    wait_for(has_trained(run))
    watchers = [start("watch", str(run), out=here / f"{number}.txt") for number in range(3)]
    wait_for(lambda: all("Mlp on 2 workers" in (here / f"{number}.txt").read_text() for number in range(3)))
    watchers[0].send_signal(signal.SIGINT)
    assert watchers[0].wait(timeout=200) == 0
    last = (here / "0.txt").read_text().splitlines()[-1]
    assert last == f"stopped watching {run}: type launcher stop {shlex.quote(str(run))} to save and stop the run"
    wait_for(has_trained(run, len(read_rows(run)) + 20))
    assert driver.poll() is None
    assert not (run / "stop").exists()
    os.kill(driver.pid, signal.SIGKILL)
    for number in (1, 2):
        assert watchers[number].wait(timeout=200) == 0
        last = (here / f"{number}.txt").read_text().splitlines()[-1]
        assert re.fullmatch(
            rf"{re.escape(str(run))} is not running: at update [\d,]+, [\d,]+ samples(, nothing saved)?", last
        )


def test_watch_shows_a_finished_run(here: Path) -> None:
    run_printed(here, "launcher recipe=mlp train.duration=2ep train.validate_every=1ep sink=[] run.name=x")
    shown = run_printed(here, "launcher watch x").stdout
    assert re.search(r"^finished [\d,]+ samples", shown, re.MULTILINE)
    assert "bottleneck" in shown
    assert shown.count("val accuracy") >= 3, "two validations and the summary"
    assert "runs/x: model.safetensors, checkpoints" in shown
