"""Read metrics.jsonl: one row per update, in order, taken from the latest generation that trained it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import RequestError
from launcher.runfolder import RUNS, runs_with

__all__ = ["POSITION", "History", "Row", "folders", "history"]

Row = Mapping[str, float]

METRICS = "metrics.jsonl"
#: Columns that locate a row; the metrics follow them.
POSITION = ("time", "samples", "update", "epoch", "world", "generation")
NEEDED = ("samples", "update")
NUMBERS = (int, float)  # exact types only: bool is excluded
LARGEST = 1e300


@dataclass(frozen=True)
class History:
    """Metrics of one run.

    `rows` excludes superseded rows, `all_rows` includes them, and `unreadable` counts the skipped lines.
    Every value is a finite number; other values are treated as not measured.
    """

    folder: Path
    rows: tuple[Row, ...]
    all_rows: tuple[Row, ...]
    unreadable: int = 0

    @property
    def name(self) -> str:
        """Folder name of the run; for a point of a sweep, prefixed with the name of the sweep."""
        path = self.folder.resolve()
        return f"{path.parent.name}/{path.name}" if path.name.isdecimal() else path.name

    def note(self) -> str | None:
        """A warning to show before any metric; None if all lines were read."""
        if not self.unreadable:
            return None
        return f"{self.folder / METRICS}: {self.unreadable} unreadable lines were skipped"


def history(word: str) -> History:
    """Read the run in the folder `word`, or the run of that name in runs/.

    Raises:
        UsageError: there is no such run, or it has no metrics yet.
    """
    found = folders(word)
    if len(found) > 1 or not (found[0] / METRICS).is_file():
        raise RequestError(f"{word} contains {len(found)} runs: name one of them, e.g. {found[0]}")
    return _read(found[0])


def folders(word: str) -> list[Path]:
    """Find the run folder named `word`, or the run folders inside it (multirun), in order.

    Raises:
        UsageError: no run was found.
    """
    for path in (Path(word), RUNS / word):
        if (path / METRICS).is_file():
            return [path]
        points = sorted((each.parent for each in path.glob(f"*/{METRICS}")), key=_order) if path.is_dir() else []
        if points:
            return points
    if any(path.is_dir() for path in (Path(word), RUNS / word)):
        raise RequestError(f"{word} has no {METRICS}: it has not trained yet")
    raise RequestError(f"{word} is not a run: {runs_with(METRICS)}")


def _order(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdecimal() else -1, folder.name)


def _read(folder: Path) -> History:
    try:
        lines = (folder / METRICS).read_bytes().split(b"\n")
    except OSError as problem:
        raise RequestError(f"{folder / METRICS} cannot be read: {problem.strerror}") from problem
    rows = [_row(line) for line in lines[:-1] if line.strip()]
    last = _row(lines[-1])  # without a newline: still being written, or truncated by a kill
    whole = [row for row in (*rows, last) if row is not None]
    if not whole:
        raise RequestError(f"{folder / METRICS} has no rows: the run has not trained yet")
    return History(folder, tuple(_counting(whole)), tuple(whole), rows.count(None))


def _row(line: bytes) -> Row | None:
    try:
        read = json.loads(line)
    except ValueError:
        return None
    if not isinstance(read, dict):
        return None
    row = {key: value for key, value in read.items() if type(value) in NUMBERS and -LARGEST < value < LARGEST}
    return row if all(key in row for key in NEEDED) else None


def _counting(rows: Iterable[Row]) -> Iterator[Row]:
    """Drop rows that a later generation, which resumed from a checkpoint, has trained again or undone."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: row.get("generation", 0)):
        while kept and (kept[-1]["update"] >= row["update"] or kept[-1]["samples"] >= row["samples"]):
            kept.pop()
        kept.append(row)
    return iter(kept)
