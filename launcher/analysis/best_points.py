"""The best points of a sweep, for the terminal's table and the report's page: the fastest and the most accurate."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from launcher.analysis.point_metrics import PointMetrics, is_lower_better

__all__ = [
    "SEED_KEY",
    "GroupKey",
    "describe_best_points",
    "drop_keys",
    "format_assignments",
    "group_by_seed",
    "name_ranked_points",
]

SEED_KEY = "seed"

#: The swept keys and values that the points of a group have in common.
GroupKey = tuple[tuple[str, str], ...]


def name_ranked_points(
    swept: Sequence[Mapping[str, str]], names: Sequence[str], metrics: Sequence[PointMetrics]
) -> dict[str, PointMetrics]:
    """The finished points to rank, by name: averages over seeds where several points differ only in their seed."""
    finished = [index for index, point in enumerate(metrics) if point.is_done]
    groups = group_by_seed([swept[index] for index in finished], [metrics[index] for index in finished])
    if len(groups) > 1:
        return {
            f"{format_assignments(key)} over {len(group)} seeds": average_metrics(group)
            for key, group in groups.items()
        }
    return {names[index]: metrics[index] for index in finished}


def describe_best_points(points: Mapping[str, PointMetrics]) -> Iterator[str]:
    """Lines that name the fastest and the most accurate finished point; none for a single point."""
    if len(points) < 2:
        return
    reached = {name: point.target_s for name, point in points.items() if point.target_s is not None}
    times = reached or {name: point.seconds or 0.0 for name, point in points.items()}
    fastest = min(times, key=lambda name: times[name])
    yield f"time-optimal: {fastest}, {times[fastest]:.1f} s {'to the target' if reached else 'in total'}"
    known = {name: point.best for name, point in points.items() if point.best is not None}
    metrics = {points[name].metric for name in known}
    if len(metrics) == 1 and (metric := metrics.pop()) is not None:
        sign = 1 if is_lower_better(metric) else -1
        best = min(known, key=lambda name: sign * known[name])
        yield f"accuracy-optimal: {best}, best {metric} {known[best]:.4g}"


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


def format_assignments(values: Mapping[str, str] | GroupKey) -> str:
    pairs = values.items() if isinstance(values, Mapping) else values
    return " ".join(f"{key}={value}" for key, value in pairs) or "all"


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
