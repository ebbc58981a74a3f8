"""The summary of a sweep: one line per point, averages over seeds, and the best points."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.analysis.point_metrics import is_lower_better, read_objective
from launcher.run_dir.run_directory import RunDirectory
from launcher.sweep.outcome import PointOutcome
from launcher.sweep.results_table import format_sweep_table


def write_point(
    folder: Path, seconds: float, accuracy: list[float], target: tuple[float, int] | None = None, batch: int = 128
) -> None:
    """`target`: seconds and updates until the target. The data set has 1,280 samples."""
    found = RunDirectory(folder)
    found.create()
    rows = [{"update": at, "val/accuracy": value} for at, value in enumerate(accuracy, 1)]
    found.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = {"world": 2, "global": batch, "lr": 0.1, "updates_per_epoch": 1280 / batch}
    found.plan_json.write_text(json.dumps(plan))
    done = {"samples": 12800, "updates": 100, "seconds": seconds}
    if target is not None:
        at_s, updates = target
        done["target"] = {"metric": "val/accuracy", "seconds": at_s, "update": updates, "samples": updates * batch}
    found.write_done(done)


def make_outcomes(*overrides: str) -> list[PointOutcome]:
    return [PointOutcome(number, ("recipe=mlp", *overrides.split()), 0) for number, overrides in enumerate(overrides)]


def test_table_lists_points_and_names_best(tmp_path: Path) -> None:
    write_point(tmp_path / "0", 10.0, [0.5, 0.99, 0.97], (9.0, 90))
    write_point(tmp_path / "1", 8.0, [0.9, 0.95], (2.5, 31))
    lines = format_sweep_table(tmp_path, make_outcomes("lr.rule=sqrt", "lr.rule=none")).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["batch", "lr", "samples/s", "target", "s", "epochs", "updates", "best", "rule"],
        ["0", "128", "0.1", "1,280", "9.0", "9.0", "90", "0.99", "sqrt"],
        ["1", "128", "0.1", "1,600", "2.5", "3.1", "31", "0.95", "none"],
    ]
    assert lines[4:] == [
        "time-optimal: point 1, 2.5 s to the target",
        "accuracy-optimal: point 0, best val/accuracy 0.99",
    ]


def test_time_optimal_without_target_is_shortest(tmp_path: Path) -> None:
    write_point(tmp_path / "0", 10.0, [0.5])
    write_point(tmp_path / "1", 12.0, [0.9])
    assert "time-optimal: point 0, 10.0 s in total" in format_sweep_table(
        tmp_path, make_outcomes("lr.base=1", "lr.base=2")
    )


def test_failed_points_are_shown_but_not_ranked(tmp_path: Path) -> None:
    write_point(tmp_path / "0", 10.0, [0.5])
    found = [*make_outcomes("lr.base=1"), PointOutcome(1, ("recipe=mlp", "lr.base=2"), 1, "failed (1)")]
    shown = format_sweep_table(tmp_path, found).splitlines()
    assert shown[3].split() == ["1", "-", "-", "failed", "(1)", "-", "-", "2"]
    assert len(shown) == 4


def test_seed_averages_are_listed_and_ranked(tmp_path: Path) -> None:
    for number, (seconds, best) in enumerate([(8.0, 0.90), (12.0, 0.92), (9.0, 0.80), (9.5, 0.82)]):
        write_point(tmp_path / str(number), 20.0, [best], (seconds, 10 * number + 10), batch=64 if number < 2 else 128)
    overrides = [f"batch.per_device={size} seed={seed}" for size in (32, 64) for seed in (0, 1)]
    lines = format_sweep_table(tmp_path, make_outcomes(*overrides)).splitlines()
    at = lines.index("averages over seed, with the standard deviation")
    assert [" ".join(line.split()) for line in lines[at + 1 : at + 4]] == [
        "seeds batch target s epochs updates best per_device",
        "2 64 10.00 ± 2.83 0.8 ± 0.4 15 ± 7 0.9100 ± 0.0141 32",
        "2 128 9.25 ± 0.35 3.5 ± 0.7 35 ± 7 0.8100 ± 0.0141 64",
    ]
    assert lines[at + 4 :] == [
        "time-optimal: batch.per_device=64 over 2 seeds, 9.2 s to the target",
        "accuracy-optimal: batch.per_device=32 over 2 seeds, best val/accuracy 0.91",
    ]
    assert max(map(len, lines)) <= 80


def test_seed_only_sweep_ranks_points(tmp_path: Path) -> None:
    for number, seconds in enumerate((8.0, 12.0)):
        write_point(tmp_path / str(number), 20.0, [0.9], (seconds, 10))
    lines = format_sweep_table(tmp_path, make_outcomes("seed=0", "seed=1")).splitlines()
    assert "averages over seed, with the standard deviation" in lines
    assert "time-optimal: point 0, 8.0 s to the target" in lines


def test_critical_batch_is_fitted_per_lr_rule(tmp_path: Path) -> None:
    overrides, number = [], 0
    for rule, noise in (("sqrt", 48), ("none", 480)):
        for batch in (16, 32, 64, 128):
            write_point(tmp_path / str(number), 20.0, [0.9], (1.0, round(1000 * (1 + noise / batch))), batch=batch)
            overrides.append(f"+lr.rule={rule} batch.per_device={batch}")
            number += 1
    lines = format_sweep_table(tmp_path, make_outcomes(*overrides)).splitlines()
    assert lines[-6:] == [
        "lr.rule=sqrt:",
        "updates to the target: 1,000 * (1 + 48 / batch), over 4 batches:",
        "critical batch size ~48: above it, extra samples outweigh saved updates",
        "lr.rule=none:",
        "updates to the target: 1,000 * (1 + 480 / batch), over 4 batches:",
        "none of these batches wastes samples: critical batch size ~480",
    ]
    assert max(map(len, lines)) <= 80


def test_long_overrides_wrap_below_their_point(tmp_path: Path) -> None:
    overrides = [
        f"recipe.hidden_width={at} optimizer.weight_decay={at} schedule.warmup={at}ep seed={at}" for at in (1, 2)
    ]
    for at in (0, 1):
        write_point(tmp_path / str(at), 10.0, [0.5], (1.0, 5))
    lines = format_sweep_table(tmp_path, make_outcomes(*overrides)).splitlines()
    assert lines[3].strip() == overrides[0]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("metric", "value", "least"),
    [
        ("val/accuracy", 0.99, False),
        ("seconds", 10.0, True),
        ("target/seconds", 9.0, True),
        ("target/updates", 90.0, True),
        ("val/nothing", None, False),
        ("nothing", None, False),
    ],
)
def test_objective_of_a_point(tmp_path: Path, metric: str, value: float | None, least: bool) -> None:
    write_point(tmp_path / "0", 10.0, [0.5, 0.99, 0.97], (9.0, 90))
    assert read_objective(tmp_path / "0", metric, not least) == value
    assert is_lower_better(metric) == least
    assert read_objective(tmp_path / "1", metric, not least) is None
