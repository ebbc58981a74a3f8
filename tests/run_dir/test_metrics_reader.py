"""Reading the metrics of a run: each update once, as last trained; invalid rows and values are ignored."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.run_dir.metrics_reader import find_runs, read_run_metrics
from tests.helpers.written_runs import make_row, write_run


def test_later_generation_supersedes_repeated_updates(tmp_path: Path) -> None:
    first = [make_row(update, train__loss=1.0) for update in range(1, 31)]
    again = [make_row(update, generation=2, train__loss=2.0) for update in range(24, 41)]
    run = read_run_metrics(str(write_run(tmp_path / "run", first + again)))
    assert [each["update"] for each in run.rows] == list(range(1, 41))
    assert {each["train/loss"] for each in run.rows if each["update"] >= 24} == {2.0}
    assert len(run.all_rows) == 47


def test_resume_at_other_batch_supersedes_later_updates(tmp_path: Path) -> None:
    """Update 51 of 128 samples continues from update 50 of 64: all of updates 51 to 100 of 64 are undone."""
    first = [make_row(update) for update in range(1, 101)]
    again = [make_row(50 + step, batch=128, samples=3200 + 128 * step, generation=2) for step in range(1, 21)]
    run = read_run_metrics(str(write_run(tmp_path / "run", first + again)))
    assert [each["update"] for each in run.rows] == list(range(1, 71))
    assert [each["samples"] for each in run.rows] == sorted(each["samples"] for each in run.rows)


def test_repeated_row_counts_once(tmp_path: Path) -> None:
    run = read_run_metrics(str(write_run(tmp_path / "run", [make_row(1), make_row(2), make_row(2, train__loss=7.0)])))
    assert [each["train/loss"] for each in run.rows] == [2.0, 7.0]


def test_unreadable_lines_are_counted_and_skipped(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [make_row(1), make_row(2)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"samples": 3, \n[1]\nnull\n{"update": "x", "samples": 1}\n')
        file.write(json.dumps(make_row(3)) + "\n" + json.dumps(make_row(4))[:50])
    run = read_run_metrics(str(folder))
    assert [each["update"] for each in run.rows] == [1, 2, 3]
    assert run.unreadable == 4
    assert "4 unreadable lines were skipped" in (run.describe_unreadable() or "")


def test_only_finite_numbers_are_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    line = '{"update": 1, "samples": 8, "a": null, "b": NaN, "c": 1e999, "d": true, "e": "<b>", "f": [1], "g": 0.5}\n'
    (folder / "metrics.jsonl").write_text(line.replace("0.5", "0.5, " + '"h": ' + "9" * 400))
    assert read_run_metrics(str(folder)).rows[0] == {"update": 1, "samples": 8, "g": 0.5}


def test_run_is_found_by_path_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "lr=0.1", [make_row(1)])
    assert read_run_metrics("lr=0.1").folder == Path("runs/lr=0.1")
    assert read_run_metrics("runs/lr=0.1").name == "lr=0.1"


def test_sweep_point_without_rows_is_passed_over(tmp_path: Path) -> None:
    """It failed before its first update; the other points are still reported."""
    for name in ("0", "1"):
        write_run(tmp_path / "sweep" / name, [make_row(1)])
    (tmp_path / "sweep" / "1" / "metrics.jsonl").write_text("")
    assert [folder.name for folder in find_runs(str(tmp_path / "sweep"))] == ["0"]


def test_sweep_points_are_in_numeric_order(tmp_path: Path) -> None:
    for point in (10, 2, 1):
        write_run(tmp_path / "sweep" / str(point), [make_row(1)])
    assert [folder.name for folder in find_runs(str(tmp_path / "sweep"))] == ["1", "2", "10"]
    assert read_run_metrics(str(tmp_path / "sweep" / "2")).name == "sweep/2"


def test_invalid_runs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="nowhere is not a run: there are no runs in runs/"):
        read_run_metrics("nowhere")
    write_run(tmp_path / "runs" / "mine", [make_row(1)])
    with pytest.raises(UsageError, match="nowhere is not a run: the most recent are mine"):
        read_run_metrics("nowhere")
    for age, name in enumerate("abcdef"):
        os.utime(write_run(tmp_path / "runs" / name, [make_row(1)]) / "metrics.jsonl", (1000 - age, 1000 - age))
    with pytest.raises(UsageError, match="nowhere is not a run: the most recent are mine, a, b, c, d and 2 more"):
        read_run_metrics("nowhere")
    for name in "abcdef":
        shutil.rmtree(tmp_path / "runs" / name)
    (tmp_path / "runs" / "young").mkdir()
    with pytest.raises(UsageError, match=r"young has no metrics\.jsonl: it has not trained yet"):
        read_run_metrics("young")
    write_run(tmp_path / "runs" / "empty", [])
    with pytest.raises(UsageError, match="has no rows"):
        read_run_metrics("empty")
    write_run(tmp_path / "runs" / "later", [make_row(1)])
    with pytest.raises(UsageError, match=r"runs contains 2 runs: name one of them, e\.g\. runs/later"):
        read_run_metrics("runs")
