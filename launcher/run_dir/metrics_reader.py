"""Read metrics.jsonl: one row per update, in order, taken from the latest generation that trained it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from launcher.run_dir.outward_links import leads_out, refuse_outward_links
from launcher.run_dir.run_directory import RUNS_DIR, suggest_runs
from launcher.system.jsonl import JsonlReader, is_number
from launcher.system.run_files import METRICS_FILE

__all__ = ["POSITION_FIELDS", "MetricValues", "RunMetrics", "find_runs", "read_run_metrics"]

MetricValues = Mapping[str, float]

#: Columns that locate a row; the metrics follow them.
POSITION_FIELDS = ("time", "samples", "update", "epoch", "world", "generation")
REQUIRED_FIELDS = ("samples", "update")


@dataclass(frozen=True)
class RunMetrics:
    """Metrics of one run.

    `rows` excludes superseded rows, `all_rows` includes them, and `unreadable` counts the skipped lines.
    Every value is a finite number; other values are treated as not measured.
    """

    folder: Path
    rows: tuple[MetricValues, ...]
    all_rows: tuple[MetricValues, ...]
    unreadable: int = 0

    @property
    def name(self) -> str:
        """Folder name of the run; for a point of a sweep, prefixed with the name of the sweep."""
        path = self.folder.resolve()
        return f"{path.parent.name}/{path.name}" if path.name.isdecimal() else path.name

    def describe_unreadable(self) -> str | None:
        """A warning to show before any metric; None if all lines were read."""
        if not self.unreadable:
            return None
        return f"{self.folder / METRICS_FILE}: {self.unreadable} unreadable lines were skipped"


def read_run_metrics(run: str) -> RunMetrics:
    """Read the run in the folder `run`, or the run of that name in runs/.

    Raises:
        UsageError: there is no such run, or it has no metrics yet.
    """
    folders = find_runs(run)
    if len(folders) > 1 or not (folders[0] / METRICS_FILE).is_file():
        raise UsageError(f"{run} contains {len(folders)} runs: name one of them, e.g. {folders[0]}")
    return _read_rows(folders[0])


def find_runs(run: str) -> list[Path]:
    """Find the run directory named `run`, or the run directories with rows inside it (multirun), in order.

    Raises:
        UsageError: no run was found, or a link leads out of one.
    """
    candidates = [path for path in (Path(run), RUNS_DIR / run) if path.is_dir()]
    for path in candidates:
        refuse_outward_links(path)
        if (path / METRICS_FILE).is_file():
            return [path]
        written = (file.parent for file in path.glob(f"*/{METRICS_FILE}") if _has_rows(file))
        if points := sorted(written, key=_get_sort_key):
            for point in points:
                _refuse_outward_point(point, path)
            return points
    if candidates:
        raise UsageError(f"{run} has no {METRICS_FILE}: it has not trained yet")
    raise UsageError(f"{run} is not a run: {suggest_runs(METRICS_FILE)}")


def _refuse_outward_point(point: Path, folder: Path) -> None:
    if leads_out(point, folder):
        raise UsageError(
            f"{point} is a link that leads out of {folder}, which is not followed: name the runs themselves"
        )
    refuse_outward_links(point)


def _has_rows(metrics: Path) -> bool:
    """Whether anything was written: a run that failed before its first update leaves an empty file."""
    try:
        return metrics.stat().st_size > 0
    except OSError:
        return False


def _get_sort_key(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdecimal() else -1, folder.name)


def _read_rows(folder: Path) -> RunMetrics:
    reader = JsonlReader(folder / METRICS_FILE)
    try:
        entries = [_keep_numbers(entry) for entry in reader]
    except OSError as problem:
        raise UsageError(f"{folder / METRICS_FILE} cannot be read: {problem.strerror}") from problem
    rows = [row for row in entries if all(key in row for key in REQUIRED_FIELDS)]
    if not rows:
        raise UsageError(f"{folder / METRICS_FILE} has no rows: the run has not trained yet")
    unreadable = reader.unreadable + len(entries) - len(rows)
    return RunMetrics(folder, tuple(_drop_superseded(rows)), tuple(rows), unreadable)


def _keep_numbers(entry: Mapping[str, Any]) -> MetricValues:
    return {key: value for key, value in entry.items() if is_number(value)}


def _drop_superseded(rows: Iterable[MetricValues]) -> Iterator[MetricValues]:
    """Drop rows that a later generation, which resumed from a checkpoint, has trained again or undone."""
    kept: list[MetricValues] = []
    for row in sorted(rows, key=lambda row: row.get("generation", 0)):
        while kept and (kept[-1]["update"] >= row["update"] or kept[-1]["samples"] >= row["samples"]):
            kept.pop()
        kept.append(row)
    return iter(kept)
