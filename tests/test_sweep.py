"""What stands at a sweep's end: a line a point, and the fastest and the most accurate named apart."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.runfolder import RunFolder
from launcher.sweep import Outcome, table


def point(folder: Path, seconds: float, accuracy: list[float], target_s: float | None = None) -> None:
    found = RunFolder(folder)
    found.create()
    rows = [{"update": at, "val/accuracy": value} for at, value in enumerate(accuracy, 1)]
    found.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found.plan_json.write_text(json.dumps({"world": 2, "global": 128, "lr": 0.1}))
    done = {"samples": 12800, "updates": 100, "seconds": seconds}
    if target_s is not None:
        done["target"] = {"metric": "val/accuracy", "seconds": target_s}
    found.write_done(done)


def outcomes(count: int) -> list[Outcome]:
    return [Outcome(number, ("recipe=mlp", f"seed={number}"), 0) for number in range(count)]


def test_a_line_a_point_and_the_best_named_apart(tmp_path: Path) -> None:
    point(tmp_path / "0", 10.0, [0.5, 0.99, 0.97], target_s=9.0)
    point(tmp_path / "1", 8.0, [0.9, 0.95], target_s=2.5)
    lines = table(tmp_path, outcomes(2)).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["batch", "rate", "samples/s", "to", "target", "best"],
        ["0", "finished", "128", "0.1", "1,280", "9.0", "s", "0.99", "seed=0"],
        ["1", "finished", "128", "0.1", "1,600", "2.5", "s", "0.95", "seed=1"],
    ]
    assert lines[4:] == [
        "time-optimal: point 1, 2.5 s to the target",
        "accuracy-optimal: point 0, best val/accuracy 0.99",
    ]


def test_without_a_target_the_fastest_is_the_one_that_trained_the_shortest(tmp_path: Path) -> None:
    point(tmp_path / "0", 10.0, [0.5])
    point(tmp_path / "1", 12.0, [0.9])
    assert "time-optimal: point 0, 10.0 s in all" in table(tmp_path, outcomes(2))


def test_points_that_have_not_finished_are_shown_and_win_nothing(tmp_path: Path) -> None:
    point(tmp_path / "0", 10.0, [0.5])
    found = [*outcomes(1), Outcome(1, ("recipe=mlp", "seed=1"), 1, "failed (1)")]
    shown = table(tmp_path, found).splitlines()
    assert shown[3].split() == ["1", "failed", "(1)", *"-----", "seed=1"]
    assert len(shown) == 4
