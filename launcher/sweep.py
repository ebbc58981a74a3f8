"""A sweep's folder, its points and the table at its end. What runs the points is Hydra's, in `launcher.config`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from launcher.checks import RUN_NAME
from launcher.errors import EXIT_OK, RequestError
from launcher.redact import redact, redacted
from launcher.runfolder import RunFolder
from launcher.settings import Run, RunSettings

__all__ = ["FINISHED", "NOT_OURS", "STOPPED", "Outcome", "ended", "folder_of", "placed", "seal", "table", "worst"]

FINISHED, STOPPED, NOT_OURS = "finished", "stopped", "not run"
HEAD = ("", "", "batch", "rate", "samples/s", "to target", "best", "")
LEFT = (1, 7)


@dataclass(frozen=True)
class Outcome:
    """How one point ended: its number, what it changed, its exit status, and in a word what that means."""

    number: int
    overrides: tuple[str, ...]
    status: int
    ended: str = "finished"

    @property
    def stopped(self) -> bool:
        return self.ended == STOPPED


def folder_of(run: RunSettings, now: float | None = None) -> Path:
    """The sweep's folder: run.dir, runs/<run.name>, or a new one named by the time (seconds since 1970)."""
    if run.dir is not None:
        return Path(run.dir)
    if run.name is not None:
        if not RUN_NAME.fullmatch(run.name):
            raise RequestError(f"run.name={run.name}: type up to 64 letters, digits, '.', '_' and '-'")
        return Path("runs") / run.name
    named = Path("runs") / time.strftime("sweep-%Y%m%d-%H%M%S", time.localtime(now))
    taken = [named, *(named.with_name(f"{named.name}-{count}") for count in range(2, 100))]
    return next(folder for folder in taken if not folder.exists())


def placed(run: Run, folder: Path, number: int | str) -> Run:
    """The point `number` of a sweep: a whole run folder of its own inside the sweep's, and one group in wandb."""
    name = f"{folder.name}-{number}"
    if "wandb" in run.sink:
        options = run.sink["wandb"] or {}
        grouped = {**options, "group": options.get("group") or folder.name}
        run = replace(run, sink={**run.sink, "wandb": grouped})
    return replace(run, run=RunSettings(name=name if RUN_NAME.fullmatch(name) else None, dir=str(folder / str(number))))


def seal(file: Path) -> None:
    """Masks the secrets in the file that Hydra wrote about the sweep, and keeps it to the user."""
    if not file.is_file() or file.is_symlink():
        return
    masked = yaml.safe_dump(redacted(yaml.safe_load(file.read_text(encoding="utf-8"))), sort_keys=False)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    with open(os.open(beside, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w", encoding="utf-8") as sealed:
        sealed.write(masked)
    beside.replace(file)


def worst(outcomes: Sequence[Outcome]) -> int:
    return max((outcome.status for outcome in outcomes), default=EXIT_OK)


def ended(run: Run, status: int) -> str:
    """In a word, what a status means once the point has been run, or given to Slurm."""
    if status != EXIT_OK:
        return f"failed ({status})"
    if run.launch.kind == "slurm":
        return "submitted"
    return FINISHED if RunFolder(Path(str(run.run.dir))).done_json.exists() else STOPPED


def table(folder: Path, outcomes: Sequence[Outcome]) -> str:
    """A line a point: how it ended, what it changed that others did not, and what it came to; then the best ones."""
    common = set.intersection(*(set(outcome.overrides) for outcome in outcomes)) if len(outcomes) > 1 else set()
    figures = {outcome.number: point_figures(folder / str(outcome.number)) for outcome in outcomes}
    rows: list[tuple[str, ...]] = [HEAD]
    for outcome in outcomes:
        own = " ".join(override for override in outcome.overrides if override not in common)
        rows.append((str(outcome.number), outcome.ended, *figures[outcome.number].cells(), own))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = [f"sweep {folder}", *(redact(f"  {aligned(row, widths)}").rstrip() for row in rows)]
    done = {number: found for number, found in figures.items() if found.seconds is not None}
    return "\n".join([*lines, *winners(done)])


def aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    pairs = enumerate(zip(row, widths, strict=True))
    return "  ".join(cell.ljust(width) if at in LEFT else cell.rjust(width) for at, (cell, width) in pairs)


def winners(points: Mapping[int, Figures]) -> Iterator[str]:
    """The fastest and the most accurate of the points that finished, which need not be the same."""
    if len(points) < 2:
        return
    reached = {number: found.target_s for number, found in points.items() if found.target_s is not None}
    times = reached or {number: found.seconds or 0.0 for number, found in points.items()}
    fastest = min(times, key=lambda number: times[number])
    yield f"time-optimal: point {fastest}, {times[fastest]:.1f} s {'to the target' if reached else 'in all'}"
    metrics = {found.metric for found in points.values()}
    if len(metrics) == 1 and (metric := metrics.pop()) is not None:
        sign = 1 if lower_is_better(metric) else -1
        best = min(points, key=lambda number: sign * (points[number].best or 0.0))
        yield f"accuracy-optimal: point {best}, best {metric} {points[best].best:.4g}"


# --- what a point came to -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What the table shows of a point; None where it is not known, as for one that has not finished."""

    batch: int | None = None
    rate: float | None = None
    samples_per_s: float | None = None
    seconds: float | None = None
    target_s: float | None = None
    metric: str | None = None
    best: float | None = None

    def cells(self) -> tuple[str, ...]:
        rate, speed = shown(self.rate, ".4g"), shown(self.samples_per_s, ",.0f")
        return shown(self.batch, ","), rate, speed, shown(self.target_s, ".1f", " s"), shown(self.best, ".4g")


def shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def point_figures(path: Path) -> Figures:
    """Read from the point's run folder: the plan that was last in force, done.json, and the best validation."""
    folder = RunFolder(path)
    plan, done = folder.read_plan() or {}, folder.read_done() or {}
    seconds = done.get("seconds")
    metric, best = best_validation(folder.metrics, done.get("target", {}).get("metric"))
    return Figures(
        batch=plan.get("global"),
        rate=plan.get("lr"),
        samples_per_s=done["samples"] / seconds if seconds else None,
        seconds=seconds,
        target_s=done.get("target", {}).get("seconds"),
        metric=metric,
        best=best,
    )


def best_validation(metrics: Path, wanted: str | None) -> tuple[str | None, float | None]:
    """The best value of the target's metric, else of val/accuracy, else of val/loss, over the whole run."""
    if not metrics.is_file():
        return None, None
    with metrics.open() as file:
        rows = [json.loads(line) for line in file if '"val/' in line and line.endswith("\n")]
    metric = next(
        (one for one in (wanted, "val/accuracy", "val/loss") if one and any(one in row for row in rows)), None
    )
    values = [row[metric] for row in rows if metric in row]
    return metric, (min(values) if lower_is_better(metric or "") else max(values)) if values else None


def lower_is_better(metric: str) -> bool:
    return "loss" in metric
