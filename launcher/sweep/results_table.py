"""The results table of a sweep: one line per point, averages over seeds, the best points, critical batch size."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.run_dir.run_directory import RunDirectory
from launcher.sweep import critical_batch
from launcher.sweep.outcome import FINISHED, PointOutcome
from launcher.system.jsonl import JsonlReader
from launcher.system.redaction import mask_secrets

__all__ = [
    "PointMetrics",
    "align_table",
    "find_swept_values",
    "format_sweep_table",
    "is_lower_better",
    "read_objective",
    "read_point_metrics",
]

MAX_TABLE_WIDTH = 80
SEED_KEY = "seed"


def format_sweep_table(folder: Path, outcomes: Sequence[PointOutcome]) -> str:
    """Results of all points and the best ones, in lines of at most 80 columns unless swept keys are too long."""
    figures = {outcome.number: read_point_metrics(folder / str(outcome.number)) for outcome in outcomes}
    swept = find_swept_values([outcome.overrides for outcome in outcomes])
    target = any(found.has_target for found in figures.values())
    rows = [
        (str(outcome.number), *figures[outcome.number].format_cells(outcome.ended, target=target))
        for outcome in outcomes
    ]
    lines = [f"sweep {folder}", *align_table(("", *list_table_heads(target)), rows, swept)]
    done = {outcome.number: figures[outcome.number] for outcome in outcomes if figures[outcome.number].is_done}
    groups = group_by_seed({outcome.number: at for outcome, at in zip(outcomes, swept, strict=True)}, done)
    named = {f"point {number}": found for number, found in done.items()}
    if groups:
        lines += ["averages over seed, with the standard deviation", *format_averages(groups, target)]
    if len(groups) > 1:
        named = {
            f"{format_assignments(key)} over {len(group)} seeds": average_metrics(group)
            for key, group in groups.items()
        }
    lines += [*best_points(named), *critical_batch_lines(swept, [figures[outcome.number] for outcome in outcomes])]
    return "\n".join(mask_secrets(line) for line in lines)


# --- columns ------------------------------------------------------------------------------------------------------


def list_table_heads(target: bool) -> tuple[str, ...]:
    return ("batch", "rate", "samples/s", *(("target s", "epochs", "updates") if target else ("seconds",)), "best")


def find_swept_values(overrides: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """For each point, the overrides that are not common to all points."""
    common = set.intersection(*(set(each) for each in overrides)) if len(overrides) > 1 else set()
    return [
        {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in each if word not in common)}
        for each in overrides
    ]


def align_table(head: Sequence[str], rows: Sequence[Sequence[str]], swept: Sequence[Mapping[str, str]]) -> list[str]:
    """Right-aligned table; swept values are extra columns, or on a line below each row if too wide."""
    keys = list(dict.fromkeys(key for values in swept for key in values))
    beside = [[*row, *(values.get(key, "-") for key in keys)] for row, values in zip(rows, swept, strict=True)]
    wide = [[*head, *(shorten_key(key, keys) for key in keys)], *beside]
    for gap in ("  ", " "):
        if len((lines := format_rows(wide, gap))[0]) <= MAX_TABLE_WIDTH:
            return lines
    first, *others = format_rows([head, *rows], "  ")
    return [
        first,
        *(line for pair in zip(others, map(format_indented, swept), strict=True) for line in pair if line.strip()),
    ]


def format_rows(rows: Sequence[Sequence[str]], gap: str) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [("  " + gap.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))) for row in rows]


def shorten_key(key: str, keys: Sequence[str]) -> str:
    """The last part of a key if it is unique among `keys`, else the whole key."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def format_assignments(values: Mapping[str, str] | tuple[tuple[str, str], ...]) -> str:
    pairs = values.items() if isinstance(values, Mapping) else values
    return " ".join(f"{key}={value}" for key, value in pairs) or "all"


def format_indented(values: Mapping[str, str]) -> str:
    return f"      {format_assignments(values)}" if values else ""


# --- below the table ----------------------------------------------------------------------------------------------

GroupKey = tuple[tuple[str, str], ...]


def group_by_seed(
    swept: Mapping[int, Mapping[str, str]], done: Mapping[int, PointMetrics]
) -> dict[GroupKey, list[PointMetrics]]:
    """Group finished points that differ only in their seed; empty if the seed is not swept over."""
    groups: dict[GroupKey, list[PointMetrics]] = {}
    for number, found in done.items():
        if SEED_KEY in swept[number]:
            groups.setdefault(drop_keys(swept[number], lambda key: key == SEED_KEY), []).append(found)
    return groups if any(len(group) > 1 for group in groups.values()) else {}


def drop_keys(values: Mapping[str, str], dropped: Callable[[str], bool]) -> GroupKey:
    return tuple((key, value) for key, value in values.items() if not dropped(key))


def format_averages(groups: Mapping[GroupKey, Sequence[PointMetrics]], target: bool) -> list[str]:
    head = ("seeds", "batch", *list_table_heads(target)[3:])
    rows = [(str(len(group)), *format_spread_cells(group, target)) for group in groups.values()]
    return align_table(head, rows, [dict(key) for key in groups])


def format_spread_cells(group: Sequence[PointMetrics], target: bool) -> Iterator[str]:
    yield format_or_dash(group[0].batch, ",")
    took = (("target_s", ".2f"), ("epochs", ".1f"), ("updates", ",.0f")) if target else (("seconds", ".2f"),)
    for name, form in (*took, ("best", ".4f")):
        yield format_spread([getattr(found, name) for found in group], form)


def format_spread(values: Sequence[float | None], form: str) -> str:
    """Mean and standard deviation of the known values, with their count if some are missing."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    deviation = f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else ""
    short_of = f" ({len(known)})" if len(known) < len(values) else ""
    return f"{statistics.fmean(known):{form}}{deviation}{short_of}"


def average_metrics(group: Sequence[PointMetrics]) -> PointMetrics:
    """Average over a group; the target counts as reached only if all points reached it."""

    def of(name: str) -> Any:
        values = [getattr(found, name) for found in group]
        return None if None in values else statistics.fmean(values)

    return PointMetrics(
        group[0].batch, group[0].rate, None, of("seconds"), of("target_s"), None, None, group[0].metric, of("best")
    )


def best_points(points: Mapping[str, PointMetrics]) -> Iterator[str]:
    """Lines that name the fastest and the most accurate finished point."""
    if len(points) < 2:
        return
    reached = {name: found.target_s for name, found in points.items() if found.target_s is not None}
    times = reached or {name: found.seconds or 0.0 for name, found in points.items()}
    fastest = min(times, key=lambda name: times[name])
    yield f"time-optimal: {fastest}, {times[fastest]:.1f} s {'to the target' if reached else 'in total'}"
    metrics = {found.metric for found in points.values()}
    if len(metrics) == 1 and (metric := metrics.pop()) is not None:
        sign = 1 if is_lower_better(metric) else -1
        best = min(points, key=lambda name: sign * (points[name].best or 0.0))
        yield f"accuracy-optimal: {best}, best {metric} {points[best].best:.4g}"


def critical_batch_lines(swept: Sequence[Mapping[str, str]], figures: Sequence[PointMetrics]) -> Iterator[str]:
    """Critical batch size for each group of points that differ only in batch keys and seed."""
    groups: dict[GroupKey, list[tuple[int, float]]] = {}
    for values, found in zip(swept, figures, strict=True):
        if found.batch is not None and found.updates is not None:
            alike = drop_keys(values, lambda key: key == SEED_KEY or key.startswith("batch."))
            groups.setdefault(alike, []).append((found.batch, found.updates))
    for alike, points in groups.items():
        lines = list(critical_batch.describe_fit(points))
        yield from [f"{format_assignments(alike)}:"] if lines and alike else []
        yield from lines


# --- metrics of a point --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PointMetrics:
    """A point's values in the table; None if unknown, e.g. because it has not finished.

    `target_s`, `epochs` and `updates` count until the target was reached.
    """

    batch: int | None = None
    rate: float | None = None
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

    def format_cells(self, ended: str, *, target: bool) -> tuple[str, ...]:
        """Table cells; the outcome replaces the throughput of an unfinished point."""
        speed = format_or_dash(self.samples_per_s, ",.0f") if ended == FINISHED else ended
        took = (
            (
                format_or_dash(self.target_s, ".1f"),
                format_or_dash(self.epochs, ".1f"),
                format_or_dash(self.updates, ","),
            )
            if target
            else (format_or_dash(self.seconds, ".1f"),)
        )
        return (
            format_or_dash(self.batch, ","),
            format_or_dash(self.rate, ".4g"),
            speed,
            *took,
            format_or_dash(self.best, ".4g"),
        )


def format_or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def read_point_metrics(path: Path) -> PointMetrics:
    """Read a point's run directory: the last plan, done.json and the best validation value."""
    run_dir = RunDirectory(path)
    plan, done = run_dir.read_plan() or {}, run_dir.read_done() or {}
    seconds, target = done.get("seconds"), done.get("target", {})
    metric, best = find_best_validation(run_dir.metrics, target.get("metric"))
    size = plan.get("updates_per_epoch", 0) * plan.get("global", 0)
    return PointMetrics(
        batch=plan.get("global"),
        rate=plan.get("lr"),
        samples_per_s=done["samples"] / seconds if seconds else None,
        seconds=seconds,
        target_s=target.get("seconds"),
        epochs=target["samples"] / size if size and "samples" in target else None,
        updates=target.get("update"),
        metric=metric,
        best=best,
    )


def find_best_validation(metrics: Path, wanted: str | None) -> tuple[str | None, float | None]:
    """Best value over the run of the target's metric, else of val/accuracy, else of val/loss."""
    rows = select_rows(metrics, "val/")
    metric = next(
        (one for one in (wanted, "val/accuracy", "val/loss") if one and any(one in row for row in rows)), None
    )
    return metric, find_best_value(rows, metric, is_lower_better(metric)) if metric else None


def find_best_value(rows: Sequence[Mapping[str, Any]], metric: str, least: bool) -> float | None:
    values = [row[metric] for row in rows if metric in row]
    return (min(values) if least else max(values)) if values else None


def select_rows(metrics: Path, start: str) -> list[dict[str, Any]]:
    """The rows with a key that begins with `start`."""
    return list(JsonlReader(metrics, containing=f'"{start}'))


def read_objective(path: Path, metric: str, most: bool) -> float | None:
    """A finished point's objective: the best value of a metric over the run, or a value of its done.json.

    `seconds`, `samples` and `updates` refer to the whole run; `target/seconds` etc. count until the target was reached.
    """
    done = RunDirectory(path).read_done()
    if done is None:
        return None
    part, _, name = metric.rpartition("/")
    facts = done.get("target", {}) if part == "target" else done
    if part in ("", "target"):
        value = facts.get("update" if name == "updates" and part else name)
        return float(value) if isinstance(value, int | float) else None
    return find_best_value(select_rows(RunDirectory(path).metrics, metric), metric, not most)


def is_lower_better(metric: str) -> bool:
    return "loss" in metric or metric.rpartition("/")[2] in ("seconds", "samples", "updates", "update")
