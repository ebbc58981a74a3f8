"""The results table of a sweep: one line per point, averages over seeds, the best points, critical batch size."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import needs
from launcher.redact import redact
from launcher.runfolder import RunFolder
from launcher.sweep import FINISHED, Outcome

__all__ = ["Figures", "aligned", "lower_is_better", "point_figures", "swept_values", "table", "value_of"]

WIDTH = 80
SEED = "seed"


def table(folder: Path, outcomes: Sequence[Outcome]) -> str:
    """Results of all points and the best ones, in lines of at most 80 columns unless swept keys are too long."""
    figures = {outcome.number: point_figures(folder / str(outcome.number)) for outcome in outcomes}
    swept = swept_values([outcome.overrides for outcome in outcomes])
    target = any(found.target for found in figures.values())
    rows = [(str(outcome.number), *figures[outcome.number].cells(outcome.ended, target=target)) for outcome in outcomes]
    lines = [f"sweep {folder}", *aligned(("", *heads(target)), rows, swept)]
    done = {outcome.number: figures[outcome.number] for outcome in outcomes if figures[outcome.number].done}
    groups = by_seed({outcome.number: at for outcome, at in zip(outcomes, swept, strict=True)}, done)
    named = {f"point {number}": found for number, found in done.items()}
    if groups:
        lines += ["averages over seed, with the standard deviation", *averages(groups, target)]
    if len(groups) > 1:
        named = {f"{words(key)} over {len(group)} seeds": mean(group) for key, group in groups.items()}
    lines += [*winners(named), *needed(swept, [figures[outcome.number] for outcome in outcomes])]
    return "\n".join(redact(line) for line in lines)


# --- columns ------------------------------------------------------------------------------------------------------


def heads(target: bool) -> tuple[str, ...]:
    return ("batch", "rate", "samples/s", *(("target s", "epochs", "updates") if target else ("seconds",)), "best")


def swept_values(overrides: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """For each point, the overrides that are not common to all points."""
    common = set.intersection(*(set(each) for each in overrides)) if len(overrides) > 1 else set()
    return [
        {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in each if word not in common)}
        for each in overrides
    ]


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], swept: Sequence[Mapping[str, str]]) -> list[str]:
    """Right-aligned table; swept values are extra columns, or on a line below each row if too wide."""
    keys = list(dict.fromkeys(key for values in swept for key in values))
    beside = [[*row, *(values.get(key, "-") for key in keys)] for row, values in zip(rows, swept, strict=True)]
    wide = [[*head, *(short(key, keys) for key in keys)], *beside]
    for gap in ("  ", " "):
        if len((lines := laid(wide, gap))[0]) <= WIDTH:
            return lines
    first, *others = laid([head, *rows], "  ")
    return [first, *(line for pair in zip(others, map(indented, swept), strict=True) for line in pair if line.strip())]


def laid(rows: Sequence[Sequence[str]], gap: str) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [("  " + gap.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))) for row in rows]


def short(key: str, keys: Sequence[str]) -> str:
    """The last part of a key if it is unique among `keys`, else the whole key."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def words(values: Mapping[str, str] | tuple[tuple[str, str], ...]) -> str:
    pairs = values.items() if isinstance(values, Mapping) else values
    return " ".join(f"{key}={value}" for key, value in pairs) or "all"


def indented(values: Mapping[str, str]) -> str:
    return f"      {words(values)}" if values else ""


# --- below the table ----------------------------------------------------------------------------------------------

Group = tuple[tuple[str, str], ...]


def by_seed(swept: Mapping[int, Mapping[str, str]], done: Mapping[int, Figures]) -> dict[Group, list[Figures]]:
    """Group finished points that differ only in their seed; empty if the seed is not swept over."""
    groups: dict[Group, list[Figures]] = {}
    for number, found in done.items():
        if SEED in swept[number]:
            groups.setdefault(without(swept[number], lambda key: key == SEED), []).append(found)
    return groups if any(len(group) > 1 for group in groups.values()) else {}


def without(values: Mapping[str, str], dropped: Callable[[str], bool]) -> Group:
    return tuple((key, value) for key, value in values.items() if not dropped(key))


def averages(groups: Mapping[Group, Sequence[Figures]], target: bool) -> list[str]:
    head = ("seeds", "batch", *heads(target)[3:])
    rows = [(str(len(group)), *spread_cells(group, target)) for group in groups.values()]
    return aligned(head, rows, [dict(key) for key in groups])


def spread_cells(group: Sequence[Figures], target: bool) -> Iterator[str]:
    yield shown(group[0].batch, ",")
    took = (("target_s", ".2f"), ("epochs", ".1f"), ("updates", ",.0f")) if target else (("seconds", ".2f"),)
    for name, form in (*took, ("best", ".4f")):
        yield spread([getattr(found, name) for found in group], form)


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean and standard deviation of the known values, with their count if some are missing."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    deviation = f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else ""
    short_of = f" ({len(known)})" if len(known) < len(values) else ""
    return f"{statistics.fmean(known):{form}}{deviation}{short_of}"


def mean(group: Sequence[Figures]) -> Figures:
    """Average over a group; the target counts as reached only if all points reached it."""

    def of(name: str) -> Any:
        values = [getattr(found, name) for found in group]
        return None if None in values else statistics.fmean(values)

    return Figures(
        group[0].batch, group[0].rate, None, of("seconds"), of("target_s"), None, None, group[0].metric, of("best")
    )


def winners(points: Mapping[str, Figures]) -> Iterator[str]:
    """Lines that name the fastest and the most accurate finished point."""
    if len(points) < 2:
        return
    reached = {name: found.target_s for name, found in points.items() if found.target_s is not None}
    times = reached or {name: found.seconds or 0.0 for name, found in points.items()}
    fastest = min(times, key=lambda name: times[name])
    yield f"time-optimal: {fastest}, {times[fastest]:.1f} s {'to the target' if reached else 'in total'}"
    metrics = {found.metric for found in points.values()}
    if len(metrics) == 1 and (metric := metrics.pop()) is not None:
        sign = 1 if lower_is_better(metric) else -1
        best = min(points, key=lambda name: sign * (points[name].best or 0.0))
        yield f"accuracy-optimal: {best}, best {metric} {points[best].best:.4g}"


def needed(swept: Sequence[Mapping[str, str]], figures: Sequence[Figures]) -> Iterator[str]:
    """Critical batch size for each group of points that differ only in batch keys and seed."""
    groups: dict[Group, list[tuple[int, float]]] = {}
    for values, found in zip(swept, figures, strict=True):
        if found.batch is not None and found.updates is not None:
            alike = without(values, lambda key: key == SEED or key.startswith("batch."))
            groups.setdefault(alike, []).append((found.batch, found.updates))
    for alike, points in groups.items():
        lines = list(needs.told(points))
        yield from [f"{words(alike)}:"] if lines and alike else []
        yield from lines


# --- metrics of a point --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
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
    def done(self) -> bool:
        return self.seconds is not None

    @property
    def target(self) -> bool:
        return self.target_s is not None

    def cells(self, ended: str, *, target: bool) -> tuple[str, ...]:
        """Table cells; the outcome replaces the throughput of an unfinished point."""
        speed = shown(self.samples_per_s, ",.0f") if ended == FINISHED else ended
        took = (
            (shown(self.target_s, ".1f"), shown(self.epochs, ".1f"), shown(self.updates, ","))
            if target
            else (shown(self.seconds, ".1f"),)
        )
        return shown(self.batch, ","), shown(self.rate, ".4g"), speed, *took, shown(self.best, ".4g")


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def point_figures(path: Path) -> Figures:
    """Read a point's run directory: the last plan, done.json and the best validation value."""
    folder = RunFolder(path)
    plan, done = folder.read_plan() or {}, folder.read_done() or {}
    seconds, target = done.get("seconds"), done.get("target", {})
    metric, best = best_validation(folder.metrics, target.get("metric"))
    size = plan.get("updates_per_epoch", 0) * plan.get("global", 0)
    return Figures(
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


def best_validation(metrics: Path, wanted: str | None) -> tuple[str | None, float | None]:
    """Best value over the run of the target's metric, else of val/accuracy, else of val/loss."""
    rows = rows_with(metrics, "val/")
    metric = next(
        (one for one in (wanted, "val/accuracy", "val/loss") if one and any(one in row for row in rows)), None
    )
    return metric, best_of(rows, metric, lower_is_better(metric)) if metric else None


def best_of(rows: Sequence[Mapping[str, Any]], metric: str, least: bool) -> float | None:
    values = [row[metric] for row in rows if metric in row]
    return (min(values) if least else max(values)) if values else None


def rows_with(metrics: Path, start: str) -> list[dict[str, Any]]:
    """The rows with a key that begins with `start`."""
    if not metrics.is_file():
        return []
    with metrics.open() as file:
        return [json.loads(line) for line in file if f'"{start}' in line and line.endswith("\n")]


def value_of(path: Path, metric: str, most: bool) -> float | None:
    """A finished point's objective: the best value of a metric over the run, or a value of its done.json.

    `seconds`, `samples` and `updates` refer to the whole run; `target/seconds` etc. count until the target was reached.
    """
    done = RunFolder(path).read_done()
    if done is None:
        return None
    part, _, name = metric.rpartition("/")
    facts = done.get("target", {}) if part == "target" else done
    if part in ("", "target"):
        value = facts.get("update" if name == "updates" and part else name)
        return float(value) if isinstance(value, int | float) else None
    return best_of(rows_with(RunFolder(path).metrics, metric), metric, not most)


def lower_is_better(metric: str) -> bool:
    return "loss" in metric or metric.rpartition("/")[2] in ("seconds", "samples", "updates", "update")
