"""The results table of a sweep: one line per point, averages over seeds, the best points, critical batch size."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launcher.analysis.best_points import (
    SEED_KEY,
    GroupKey,
    describe_best_points,
    drop_keys,
    format_assignments,
    group_by_seed,
    name_ranked_points,
)
from launcher.analysis.point_metrics import PointMetrics, read_point_metrics
from launcher.sweep import critical_batch
from launcher.sweep.outcome import FINISHED, PointOutcome
from launcher.system.redaction import mask_secrets

__all__ = ["align_table", "find_swept_values", "format_sweep_table"]

MAX_TABLE_WIDTH = 80


def format_sweep_table(folder: Path, outcomes: Sequence[PointOutcome]) -> str:
    """Results of all points and the best ones, in lines of at most 80 columns unless swept keys are too long."""
    metrics = [read_point_metrics(outcome.get_path(folder)) for outcome in outcomes]
    swept = find_swept_values([outcome.overrides for outcome in outcomes])
    target = any(point.has_target for point in metrics)
    rows = [
        (outcome.label, *format_cells(point, outcome.ended, target=target))
        for outcome, point in zip(outcomes, metrics, strict=True)
    ]
    lines = [f"sweep {folder}", *align_table(("", *list_table_heads(target)), rows, swept)]
    finished = [index for index, point in enumerate(metrics) if point.is_done]
    groups = group_by_seed([swept[index] for index in finished], [metrics[index] for index in finished])
    if groups:
        lines += ["averages over seed, with the standard deviation", *format_averages(groups, target)]
    named = name_ranked_points(swept, [f"point {outcome.label}" for outcome in outcomes], metrics)
    lines += [*describe_best_points(named), *format_critical_batch(swept, metrics)]
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


# --- below the table ----------------------------------------------------------------------------------------------


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
