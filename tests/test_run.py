"""launcher.run: the command line as a function, from any thread."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import launcher
from launcher.system.signal_handlers import forward_signals_to, sigterm_as_keyboard_interrupt
from tests.helpers.jobs import make_env
from tests.helpers.small_job import HELD, RECIPE, run_launcher

TRAIN_TWICE = """
import sys, threading
import launcher

assert "torch" not in sys.modules
statuses = []
def train():
    statuses.append(launcher.run([*sys.argv[1:], "run.name=one"]))
    statuses.append(launcher.run([*sys.argv[1:], "run.name=two", "batch.per_device=0"]))
    statuses.append(launcher.run([*sys.argv[1:], "run.name=two", "optimizer=adamw"]))
thread = threading.Thread(target=train)
thread.start()
thread.join()
print(statuses)
"""


def call_in_thread(function: object) -> list[object]:
    """Call a function in a thread and return its result, or its exception."""
    results: list[object] = []

    def call() -> None:
        try:
            results.append(function())  # type: ignore[operator]
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return results


def test_status_is_returned_and_errors_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert launcher.run(["plan", "recipe=mlp", "plan.world_sizes=[1]"]) == 0
    assert capsys.readouterr().out
    assert call_in_thread(lambda: launcher.run(["recipe=mlp", "batch.per_device=0"])) == [2]
    assert capsys.readouterr().err.startswith("error: batch.per_device=0")
    assert not list(tmp_path.iterdir())


def test_text_is_refused() -> None:
    with pytest.raises(TypeError, match=r"type launcher\.run\(\['recipe=mlp', 'seed=1'\]\)"):
        launcher.run("recipe=mlp seed=1")


def test_signals_stay_with_the_program_that_calls_from_a_thread() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]

    def install() -> None:
        with forward_signals_to(lambda *_: None), sigterm_as_keyboard_interrupt():
            assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before

    assert call_in_thread(install) == [None]


def test_argument_that_is_not_text_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.run(["recipe=mlp", "run.dir=caf\udce9"]) == 2
    assert capsys.readouterr().err.startswith("error: run.dir=caf\\udce9 is not UTF-8")


@pytest.mark.slow
def test_training_twice_in_a_thread(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(RECIPE)
    argv = [sys.executable, "-c", TRAIN_TWICE, *HELD, "train.duration=1ep"]
    trained = subprocess.run(argv, cwd=tmp_path, env=make_env(), capture_output=True, text=True, check=True)
    assert trained.stdout.splitlines()[-1] == "[0, 2, 0]"
    assert (tmp_path / "runs/one/done.json").exists()
    assert (tmp_path / "runs/two/done.json").exists()


@pytest.mark.slow
def test_training_without_streams_in_a_folder_that_is_not_utf8(tmp_path: Path) -> None:
    """As a daemon starts it; the folder's name is not text, and the last checkpoint loads."""
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    (folder / "own.py").write_text(RECIPE)
    argv = [sys.executable, "-m", "launcher", *HELD, "train.duration=1ep", "run.name=x", "sink=[console]"]
    closed = ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", *argv]
    assert subprocess.run(closed, cwd=folder, env=make_env(), check=False).returncode == 0
    assert (folder / "runs/x/done.json").exists()
    assert "is complete" in run_launcher(folder, *HELD, "train.duration=1ep", "run.name=x", "sink=[console]").stdout
