"""Read metrics.jsonl: one row per update, in order, taken from the latest generation that trained it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UsageError
from launcher.run_dir.run_directory import RUNS_DIR, suggest_runs

__all__ = ["POSITION_FIELDS", "MetricValues", "RunMetrics", "find_runs", "read_run_metrics"]

MetricValues = Mapping[str, float]

METRICS_FILENAME = "metrics.jsonl"
#: Columns that locate a row; the metrics follow them.
POSITION_FIELDS = ("time", "samples", "update", "epoch", "world", "generation")
REQUIRED_FIELDS = ("samples", "update")
NUMBER_TYPES = (int, float)  # exact types only: bool is excluded
MAX_METRIC_VALUE = 1e300


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
        return f"{self.folder / METRICS_FILENAME}: {self.unreadable} unreadable lines were skipped"


def read_run_metrics(word: str) -> RunMetrics:
    """Read the run in the folder `word`, or the run of that name in runs/.

    Raises:
        UsageError: there is no such run, or it has no metrics yet.
    """
    found = find_runs(word)
    if len(found) > 1 or not (found[0] / METRICS_FILENAME).is_file():
        raise UsageError(f"{word} contains {len(found)} runs: name one of them, e.g. {found[0]}")
    return _read_rows(found[0])


def find_runs(word: str) -> list[Path]:
    """Find the run folder named `word`, or the run folders inside it (multirun), in order.

    Raises:
        UsageError: no run was found.
    """
    for path in (Path(word), RUNS_DIR / word):
        if (path / METRICS_FILENAME).is_file():
            return [path]
        points = (
            sorted((each.parent for each in path.glob(f"*/{METRICS_FILENAME}")), key=_get_sort_key)
            if path.is_dir()
            else []
        )
        if points:
            return points
    if any(path.is_dir() for path in (Path(word), RUNS_DIR / word)):
        raise UsageError(f"{word} has no {METRICS_FILENAME}: it has not trained yet")
    raise UsageError(f"{word} is not a run: {suggest_runs(METRICS_FILENAME)}")


def _get_sort_key(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdecimal() else -1, folder.name)


def _read_rows(folder: Path) -> RunMetrics:
    try:
        lines = (folder / METRICS_FILENAME).read_bytes().split(b"\n")
    except OSError as problem:
        raise UsageError(f"{folder / METRICS_FILENAME} cannot be read: {problem.strerror}") from problem
    rows = [_parse_row(line) for line in lines[:-1] if line.strip()]
    last = _parse_row(lines[-1])  # without a newline: still being written, or truncated by a kill
    whole = [row for row in (*rows, last) if row is not None]
    if not whole:
        raise UsageError(f"{folder / METRICS_FILENAME} has no rows: the run has not trained yet")
    return RunMetrics(folder, tuple(_drop_superseded(whole)), tuple(whole), rows.count(None))


def _parse_row(line: bytes) -> MetricValues | None:
    try:
        read = json.loads(line)
    except ValueError:
        return None
    if not isinstance(read, dict):
        return None
    row = {
        key: value
        for key, value in read.items()
        if type(value) in NUMBER_TYPES and -MAX_METRIC_VALUE < value < MAX_METRIC_VALUE
    }
    return row if all(key in row for key in REQUIRED_FIELDS) else None


def _drop_superseded(rows: Iterable[MetricValues]) -> Iterator[MetricValues]:
    """Drop rows that a later generation, which resumed from a checkpoint, has trained again or undone."""
    kept: list[MetricValues] = []
    for row in sorted(rows, key=lambda row: row.get("generation", 0)):
        while kept and (kept[-1]["update"] >= row["update"] or kept[-1]["samples"] >= row["samples"]):
            kept.pop()
        kept.append(row)
    return iter(kept)
