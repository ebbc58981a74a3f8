"""`tune -m` without measuring: all points are measured in turn, failures do not stop it, and its outputs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import RunConfig
from launcher.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, UsageError
from launcher.goodput.auto_batch import MeasurementError
from launcher.tune.tune_sweep import get_image_size, tune_sweep
from tests.helpers.measured_sizes import document_with_memory

# --- memory over images of several sizes --------------------------------------------------------------------------


# --- one table, one document --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "size"), [(32, (32, 32)), ([48, 64], (48, 64)), (None, None), ("large", None)])
def test_image_size_is_one_number_or_pair(value: Any, size: Any) -> None:
    assert get_image_size(RunConfig(recipe={"_target_": "x", "image_size": value})) == size


# --- from the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_measure(
    measured: list[Any], fail_at: int | None = None, error: Exception | None = None
) -> Callable[[RunConfig], Any]:
    def measure(config: RunConfig) -> dict[str, Any]:
        size = int(config.recipe["image_size"])
        measured.append(size)
        if size == fail_at and error is not None:
            raise error
        return {**document_with_memory(size, size), "said": [], "cached": False}

    return measure


SWEPT = ("-m", "recipe=resnet", "recipe.image_size=32,64,96")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (MeasurementError("rank 0 was killed by SIGKILL: out of memory?"), EXIT_FAILED, "rank 0 was killed"),
        (UsageError("recipe.image_size=64 is no size"), EXIT_USAGE, "recipe.image_size=64 is no size"),
        (OSError("no disk at s3://u:hunter2@h"), EXIT_FAILED, "OSError: no disk at s3://u:***@h"),
    ],
)
def test_failed_point_does_not_stop_the_sweep(
    work_dir: Path, capsys: pytest.CaptureFixture[str], error: Exception, status: int, message: str
) -> None:
    measured: list[Any] = []
    assert tune_sweep([*SWEPT], make_measure(measured, 64, error)) == status
    assert measured == [32, 64, 96]
    captured = capsys.readouterr()
    assert f"error: {message}" in captured.err
    assert f"  1  failed ({status}) " in captured.out
    assert f"point 1: {message}" in captured.out
    assert "point 2: recipe=resnet recipe.image_size=96\n" in captured.err
    assert list(work_dir.iterdir()) == []


def test_stdout_is_one_json_document(work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune_sweep([*SWEPT, "format=json", "batch.global=64"], make_measure([])) == EXIT_OK
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [one["overrides"]["recipe.image_size"] for one in found["points"]] == [32, 64, 96]
    assert "format" not in found["points"][0]["overrides"]
    assert found["points"][0]["found"]["goodput"] is None
    assert captured.err.count("note: batch.global=64 selects batch=hold") == 3


def test_tune_out_contains_document_and_pages(work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune_sweep([*SWEPT, "tune.out=out", "run.name=s"], make_measure([], 64, OSError("no disk")))
    assert sorted(str(path.relative_to(work_dir)) for path in work_dir.rglob("*") if path.is_file()) == [
        "out/0/tune.html",
        "out/2/tune.html",
        "out/tune.json",
    ]
    found = json.loads(Path("out/tune.json").read_text())
    assert [one["error"] for one in found["points"]] == [None, "OSError: no disk", None]
    assert "written: out/tune.json, out/0/tune.html, out/2/tune.html" in capsys.readouterr().err


def test_sigterm_ends_the_sweep(work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured: list[Any] = []

    def measure(config: RunConfig) -> dict[str, Any]:
        measured.append(config)
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        tune_sweep([*SWEPT], measure)
    assert len(measured) == 1
    assert capsys.readouterr().out == ""
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["batch.per_device=8,x"], "batch.per_device=x: expected a whole number"),
        (["seed=1,2", "tune.size=[8]"], "tune.size is not a key: did you mean tune.sizes?"),
        (["sweep.at_once=2"], "sweep.at_once is not a key: did you mean sweep.max_parallel?"),
        (["format=json,text"], "format can't be swept over, as all points go into one table"),
        (["tune.out=a,b"], "tune.out can't be swept over"),
        (["run.name=a,b"], "run.name can't be swept over"),
        (
            ["sweep.max_parallel=2"],
            "sweep.max_parallel=2 is only for training: tune measures the listed points one after",
        ),
        (["sweep.trials=4", "lr.base=interval(0.1,1)"], "sweep.trials=4 is only for training"),
        (["--shard=0/4"], "--shard=0/4 is only for training"),
    ],
)
def test_usage_errors_precede_measuring(work_dir: Path, args: list[str], message: str) -> None:
    measured: list[Any] = []
    with pytest.raises(UsageError) as caught:
        tune_sweep([*SWEPT, *args], make_measure(measured))
    assert message in str(caught.value)
    assert measured == []
    assert list(work_dir.iterdir()) == []


def test_dry_run_prints_each_command(work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune_sweep(["-m", "recipe=mlp", "launch.workers=1,2", "launch.dry_run=true"], make_measure([])) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert [f"--nproc-per-node={n}" in line for n, line in enumerate(lines, 1)] == [True, True]
