"""The results table of a sweep: one line per point, averages over seeds, the best points, critical batch size."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from launcher.sweep import critical_batch
from launcher.sweep.outcome import FINISHED, PointOutcome
from launcher.sweep.point_metrics import PointMetrics, is_lower_better, read_point_metrics
from launcher.system.redaction import mask_secrets

__all__ = ["align_table", "find_swept_values", "format_sweep_table"]

MAX_TABLE_WIDTH = 80
SEED_KEY = "seed"

#: The swept keys and values that the points of a group have in common.
GroupKey = tuple[tuple[str, str], ...]


def format_sweep_table(folder: Path, outcomes: Sequence[PointOutcome]) -> str:
    """Results of all points and the best ones, in lines of at most 80 columns unless swept keys are too long."""
    metrics = [read_point_metrics(folder / str(outcome.number)) for outcome in outcomes]
    swept = find_swept_values([outcome.overrides for outcome in outcomes])
    target = any(point.has_target for point in metrics)
    rows = [
        (str(outcome.number), *format_cells(point, outcome.ended, target=target))
        for outcome, point in zip(outcomes, metrics, strict=True)
    ]
    lines = [f"sweep {folder}", *align_table(("", *list_table_heads(target)), rows, swept)]
    finished = [index for index, point in enumerate(metrics) if point.is_done]
    groups = group_by_seed([swept[index] for index in finished], [metrics[index] for index in finished])
    named = {f"point {outcomes[index].number}": metrics[index] for index in finished}
    if groups:
        lines += ["averages over seed, with the standard deviation", *format_averages(groups, target)]
    if len(groups) > 1:
        named = {
            f"{format_assignments(key)} over {len(group)} seeds": average_metrics(group)
            for key, group in groups.items()
        }
    lines += [*format_best_points(named), *format_critical_batch(swept, metrics)]
    return "\n".join(mask_secrets(line) for line in lines)


# --- columns ------------------------------------------------------------------------------------------------------


def list_table_heads(target: bool) -> tuple[str, ...]:
    return ("batch", "lr", "samples/s", *(("target s", "epochs", "updates") if target else ("seconds",)), "best")


def format_cells(point: PointMetrics, ended: str, *, target: bool) -> tuple[str, ...]:
    """Cells of a row; the outcome replaces the throughput of an unfinished point."""
    effort: tuple[str, ...] = (format_or_dash(point.seconds, ".1f"),)
    if target:
        effort = (
            format_or_dash(point.target_s, ".1f"),
            format_or_dash(point.epochs, ".1f"),
            format_or_dash(point.updates, ","),
        )
    speed = format_or_dash(point.samples_per_s, ",.0f") if ended == FINISHED else ended
    batch, lr, best = (
        format_or_dash(point.batch, ","),
        format_or_dash(point.lr, ".4g"),
        format_or_dash(point.best, ".4g"),
    )
    return (batch, lr, speed, *effort, best)


def format_or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def find_swept_values(overrides: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """For each point, the overrides that are not common to all points."""
    common = set.intersection(*map(set, overrides)) if len(overrides) > 1 else set()
    return [
        {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in words if word not in common)}
        for words in overrides
    ]


def align_table(head: Sequence[str], rows: Sequence[Sequence[str]], swept: Sequence[Mapping[str, str]]) -> list[str]:
    """Right-aligned table; swept values are extra columns, or on a line below each row if too wide."""
    keys = list(dict.fromkeys(key for values in swept for key in values))
    extended = [[*row, *(values.get(key, "-") for key in keys)] for row, values in zip(rows, swept, strict=True)]
    wide = [[*head, *(shorten_key(key, keys) for key in keys)], *extended]
    for gap in ("  ", " "):
        if len((lines := align_rows(wide, gap))[0]) <= MAX_TABLE_WIDTH:
            return lines
    first, *others = align_rows([head, *rows], "  ")
    below = [f"      {format_assignments(values)}" if values else "" for values in swept]
    return [first, *(line for pair in zip(others, below, strict=True) for line in pair if line.strip())]


def align_rows(rows: Sequence[Sequence[str]], gap: str) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [("  " + gap.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))) for row in rows]


def shorten_key(key: str, keys: Sequence[str]) -> str:
    """The last part of a key if it is unique among `keys`, else the whole key."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def format_assignments(values: Mapping[str, str] | GroupKey) -> str:
    pairs = values.items() if isinstance(values, Mapping) else values
    return " ".join(f"{key}={value}" for key, value in pairs) or "all"


# --- below the table ----------------------------------------------------------------------------------------------


def group_by_seed(
    swept: Sequence[Mapping[str, str]], metrics: Sequence[PointMetrics]
) -> dict[GroupKey, list[PointMetrics]]:
    """Group finished points that differ only in their seed; empty if the seed is not swept over."""
    groups: dict[GroupKey, list[PointMetrics]] = {}
    for values, point in zip(swept, metrics, strict=True):
        if SEED_KEY in values:
            groups.setdefault(drop_keys(values, lambda key: key == SEED_KEY), []).append(point)
    return groups if any(len(group) > 1 for group in groups.values()) else {}


def drop_keys(values: Mapping[str, str], is_dropped: Callable[[str], bool]) -> GroupKey:
    return tuple((key, value) for key, value in values.items() if not is_dropped(key))


def format_averages(groups: Mapping[GroupKey, Sequence[PointMetrics]], target: bool) -> list[str]:
    head = ("seeds", "batch", *list_table_heads(target)[3:])
    rows = [(str(len(group)), *iter_spread_cells(group, target)) for group in groups.values()]
    return align_table(head, rows, [dict(key) for key in groups])


def iter_spread_cells(group: Sequence[PointMetrics], target: bool) -> Iterator[str]:
    yield format_or_dash(group[0].batch, ",")
    effort = (("target_s", ".2f"), ("epochs", ".1f"), ("updates", ",.0f")) if target else (("seconds", ".2f"),)
    for name, form in (*effort, ("best", ".4f")):
        yield format_spread([getattr(point, name) for point in group], form)


def format_spread(values: Sequence[float | None], form: str) -> str:
    """Mean and standard deviation of the known values, with their count if some are missing."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    deviation = f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else ""
    count = f" ({len(known)})" if len(known) < len(values) else ""
    return f"{statistics.fmean(known):{form}}{deviation}{count}"


def average_metrics(group: Sequence[PointMetrics]) -> PointMetrics:
    """Average over a group; the target counts as reached only if all points reached it."""
    first = group[0]
    return PointMetrics(
        batch=first.batch,
        lr=first.lr,
        seconds=average_if_complete([point.seconds for point in group]),
        target_s=average_if_complete([point.target_s for point in group]),
        metric=first.metric,
        best=average_if_complete([point.best for point in group]),
    )


def average_if_complete(values: Sequence[float | None]) -> float | None:
    """The mean, or None if a value is missing."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def format_best_points(points: Mapping[str, PointMetrics]) -> Iterator[str]:
    """Lines that name the fastest and the most accurate finished point."""
    if len(points) < 2:
        return
    reached = {name: point.target_s for name, point in points.items() if point.target_s is not None}
    times = reached or {name: point.seconds or 0.0 for name, point in points.items()}
    fastest = min(times, key=lambda name: times[name])
    yield f"time-optimal: {fastest}, {times[fastest]:.1f} s {'to the target' if reached else 'in total'}"
    metrics = {point.metric for point in points.values()}
    if len(metrics) == 1 and (metric := metrics.pop()) is not None:
        sign = 1 if is_lower_better(metric) else -1
        best = min(points, key=lambda name: sign * (points[name].best or 0.0))
        yield f"accuracy-optimal: {best}, best {metric} {points[best].best:.4g}"


def format_critical_batch(swept: Sequence[Mapping[str, str]], metrics: Sequence[PointMetrics]) -> Iterator[str]:
    """Critical batch size for each group of points that differ only in batch keys and seed."""
    groups: dict[GroupKey, list[tuple[int, float]]] = {}
    for values, point in zip(swept, metrics, strict=True):
        if point.batch is not None and point.updates is not None:
            group = drop_keys(values, lambda key: key == SEED_KEY or key.startswith("batch."))
            groups.setdefault(group, []).append((point.batch, point.updates))
    for group, points in groups.items():
        lines = list(critical_batch.describe_fit(points))
        yield from [f"{format_assignments(group)}:"] if lines and group else []
        yield from lines
