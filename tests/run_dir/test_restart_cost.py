"""The cost of a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.run_dir.restart_cost import RestartCost, read_last_row, sum_restart_costs


def row(samples: int, **more: float) -> str:
    return json.dumps({"time": 100.0 + samples, "samples": samples, "update": samples // 10, **more})


def test_last_row_skips_torn_line(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(f"{row(10)}\n{row(20)}\n" + row(30)[:15])
    found = read_last_row(metrics)
    assert found is not None
    assert found["samples"] == 20


def test_last_row_of_long_file_is_found(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f"{row(number)}\n" for number in range(10_000)))
    found = read_last_row(metrics)
    assert found is not None
    assert found["samples"] == 9_999


@pytest.mark.parametrize("text", [None, "", "\n", "{"])
def test_no_rows_means_no_cost(tmp_path: Path, text: str | None) -> None:
    metrics = tmp_path / "metrics.jsonl"
    if text is not None:
        metrics.write_text(text)
    assert read_last_row(metrics) is None
    assert RestartCost.from_last_row(None, 0, restarted=True).to_metrics(5.0) == {}


def test_lost_samples_follow_the_checkpoint() -> None:
    before = {"time": 100.0, "samples": 700}
    restarted = RestartCost.from_last_row(before, 500, restarted=True)
    assert restarted.to_metrics(103.5) == {"elastic/recovery_s": 3.5, "elastic/lost_samples": 200}
    new_command = RestartCost.from_last_row(before, 500, restarted=False)
    assert new_command.to_metrics(9e9) == {"elastic/lost_samples": 200}, "time between commands is not recovery"
    assert RestartCost.from_last_row(before, 700, restarted=False).to_metrics(9e9) == {}, (
        "a requested stop loses nothing"
    )


def test_totals_include_superseded_restarts(tmp_path: Path) -> None:
    one = row(10, **{"elastic/recovery_s": 2.0, "elastic/lost_samples": 5})
    two = row(10, **{"elastic/recovery_s": 3.0, "elastic/lost_samples": 0})
    three = row(20, **{"elastic/lost_samples": 7})
    (tmp_path / "m").write_text("\n".join([row(5), one, row(20), two, three]) + "\n")
    assert sum_restart_costs(tmp_path / "m") == {"recovery_s": 5.0, "lost_samples": 12}
