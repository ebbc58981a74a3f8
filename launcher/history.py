"""What metrics.jsonl tells of a run afterwards: each update once, in order, as it was last trained."""

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
#: Where a row stands, before what was measured there.
POSITION = ("time", "samples", "update", "epoch", "world", "generation")
NEEDED = ("samples", "update")
NUMBERS = (int, float)  # and nothing that is one by inheritance: true is no figure
LARGEST = 1e300


@dataclass(frozen=True)
class History:
    """`rows` are those that count, `all_rows` also those of updates that were run again; `unreadable` lines were not.

    Every value is a finite number: what is none was not measured.
    """

    folder: Path
    rows: tuple[Row, ...]
    all_rows: tuple[Row, ...]
    unreadable: int = 0

    @property
    def name(self) -> str:
        """As its owner knows it; a sweep's point by the sweep as well."""
        path = self.folder.resolve()
        return f"{path.parent.name}/{path.name}" if path.name.isdecimal() else path.name

    def note(self) -> str | None:
        """What a reader must be told before any figure."""
        if not self.unreadable:
            return None
        return f"{self.folder / METRICS}: {self.unreadable} lines are no rows and were left out"


def history(word: str) -> History:
    """The run in the folder `word`, or of that name in runs/.

    Raises:
        RequestError: there is no such run, or nothing was trained in it.
    """
    found = folders(word)
    if len(found) > 1 or not (found[0] / METRICS).is_file():
        raise RequestError(f"{word} holds {len(found)} runs: name one, e.g. {found[0]}")
    return _read(found[0])


def folders(word: str) -> list[Path]:
    """The run folder that is meant, or those in a folder of runs (multirun), in their order.

    Raises:
        RequestError: there is neither.
    """
    for path in (Path(word), RUNS / word):
        if (path / METRICS).is_file():
            return [path]
        points = sorted((each.parent for each in path.glob(f"*/{METRICS}")), key=_order) if path.is_dir() else []
        if points:
            return points
    if any(path.is_dir() for path in (Path(word), RUNS / word)):
        raise RequestError(f"{word} has no {METRICS}: nothing was trained there yet")
    raise RequestError(f"{word} is no run: {runs_with(METRICS)}")


def _order(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdecimal() else -1, folder.name)


def _read(folder: Path) -> History:
    try:
        lines = (folder / METRICS).read_bytes().split(b"\n")
    except OSError as problem:
        raise RequestError(f"{folder / METRICS} cannot be read: {problem.strerror}") from problem
    rows = [_row(line) for line in lines[:-1] if line.strip()]
    last = _row(lines[-1])  # without its newline it is being written, or a kill cut it off
    whole = [row for row in (*rows, last) if row is not None]
    if not whole:
        raise RequestError(f"{folder / METRICS} holds no row: nothing was trained there yet")
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
    """A later start of the workers goes on from a checkpoint: what had been trained beyond it is undone."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: row.get("generation", 0)):
        while kept and (kept[-1]["update"] >= row["update"] or kept[-1]["samples"] >= row["samples"]):
            kept.pop()
        kept.append(row)
    return iter(kept)
