"""What a sweep needs to know of its points: the time, the best metric and the objective, read from run directories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.run_dir.run_directory import RunDirectory
from launcher.system.jsonl import JsonlReader

__all__ = ["PointMetrics", "is_lower_better", "read_objective", "read_point_metrics"]


@dataclass(frozen=True)
class PointMetrics:
    """A point's values in the table; None if unknown, e.g. because it has not finished.

    `target_s`, `epochs` and `updates` count until the target was reached. `best` is the best value of `metric`.
    """

    batch: int | None = None
    lr: float | None = None
    samples_per_s: float | None = None
    seconds: float | None = None
    target_s: float | None = None
    epochs: float | None = None
    updates: int | None = None
    metric: str | None = None
    best: float | None = None

    @property
    def is_done(self) -> bool:
        return self.seconds is not None

    @property
    def has_target(self) -> bool:
        return self.target_s is not None


def read_point_metrics(path: Path) -> PointMetrics:
    """Read a point's run directory: the last plan, done.json and the best validation value."""
    run_dir = RunDirectory(path)
    plan, done = run_dir.read_plan() or {}, run_dir.read_done() or {}
    seconds, target = done.get("seconds"), done.get("target", {})
    metric, best = find_best_validation(run_dir.metrics, target.get("metric"))
    epoch_samples = plan.get("updates_per_epoch", 0) * plan.get("global", 0)
    return PointMetrics(
        batch=plan.get("global"),
        lr=plan.get("lr"),
        samples_per_s=done["samples"] / seconds if seconds else None,
        seconds=seconds,
        target_s=target.get("seconds"),
        epochs=target["samples"] / epoch_samples if epoch_samples and "samples" in target else None,
        updates=target.get("update"),
        metric=metric,
        best=best,
    )


def find_best_validation(metrics: Path, target_metric: str | None) -> tuple[str | None, float | None]:
    """Best value over the run of the target's metric, else of val/accuracy, else of val/loss."""
    rows = select_rows(metrics, "val/")
    candidates = (target_metric, "val/accuracy", "val/loss")
    metric = next((name for name in candidates if name and any(name in row for row in rows)), None)
    return metric, find_best_value(rows, metric, is_lower_better(metric)) if metric else None


def find_best_value(rows: Sequence[Mapping[str, Any]], metric: str, lower_is_better: bool) -> float | None:
    values = [row[metric] for row in rows if metric in row]
    return (min(values) if lower_is_better else max(values)) if values else None


def select_rows(metrics: Path, start: str) -> list[dict[str, Any]]:
    """The rows with a key that begins with `start`."""
    return list(JsonlReader(metrics, containing=f'"{start}'))


def read_objective(path: Path, metric: str, maximize: bool) -> float | None:
    """A finished point's objective: the best value of a metric over the run, or a value of its done.json.

    `seconds`, `samples` and `updates` refer to the whole run; `target/seconds` etc. count until the target was reached.
    """
    done = RunDirectory(path).read_done()
    if done is None:
        return None
    prefix, _, name = metric.rpartition("/")
    values = done.get("target", {}) if prefix == "target" else done
    if prefix in ("", "target"):
        value = values.get("update" if name == "updates" and prefix else name)
        return float(value) if isinstance(value, int | float) else None
    return find_best_value(select_rows(RunDirectory(path).metrics, metric), metric, not maximize)


def is_lower_better(metric: str) -> bool:
    return "loss" in metric or metric.rpartition("/")[2] in ("seconds", "samples", "updates", "update")
