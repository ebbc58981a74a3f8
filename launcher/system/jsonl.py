"""Read JSONL files: from the start, backwards from the end, or following a file that still grows.

Only lines that hold a JSON object are returned. A last line without a newline that does not parse is still being
written, or was truncated by a kill; other lines that are not objects are skipped. `launcher.telemetry.sinks.jsonl`
writes such files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["JsonlReader", "JsonlTail", "is_number", "iter_jsonl_backwards", "parse_json_object"]

TAIL_BYTES = 1 << 18
NUMBER_TYPES = (int, float)  # exact types only: bool is excluded
MAX_NUMBER = 1e300


def parse_json_object(line: bytes) -> dict[str, Any] | None:
    """Parse one line; None if it is not a JSON object."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def is_number(value: Any) -> bool:
    """Whether a parsed value is a number that can be calculated with: finite, and not a bool."""
    return type(value) in NUMBER_TYPES and -MAX_NUMBER < value < MAX_NUMBER


class JsonlReader:
    """Iterates over the objects of a file; a missing file has none.

    `containing`: skip the lines without this text before they are parsed, which is much faster in a long file.
    `unreadable` counts the complete lines of the last iteration that are not objects.
    """

    def __init__(self, path: Path, containing: str = "") -> None:
        self.unreadable = 0
        self._path = path
        self._containing = containing.encode()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the objects in order. Raises OSError if the file exists but cannot be read."""
        self.unreadable = 0
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            for line in file:
                if self._containing not in line:
                    continue
                entry = parse_json_object(line)
                if entry is not None:
                    yield entry
                elif line.endswith(b"\n") and line.strip():
                    self.unreadable += 1


def iter_jsonl_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in the last 256 KiB of a file, the last one first.

    Raises:
        OSError: the file does not exist or cannot be read.
    """
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
        file.seek(start)
        lines = file.read().split(b"\n")
    for line in reversed(lines[1 if start else 0 :]):
        if (entry := parse_json_object(line)) is not None:
            yield entry


class JsonlTail:
    """Follows a file and yields the objects of new lines. A line is read once it ends in a newline.

    A truncated or replaced file is read from its beginning; objects that were yielded before are skipped by `time`.
    """

    def __init__(self, path: Path, numbers: Sequence[str] = ("time",)) -> None:
        """`numbers`: the numeric fields that every object must have."""
        self._path, self._numbers = path, numbers
        self._offset = self._inode = 0
        self._newest_time = self._skip_until = -math.inf

    def read_new_objects(self) -> Iterator[dict[str, Any]]:
        """Yield the objects added since the last call; nothing if the file does not exist or cannot be read now."""
        try:
            file = self._path.open("rb")
        except OSError:
            return
        with file:
            stat = os.fstat(file.fileno())
            if stat.st_ino != self._inode or stat.st_size < self._offset:
                self._inode, self._offset, self._skip_until = stat.st_ino, 0, self._newest_time
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                entry = parse_json_object(line)
                if entry is None or not all(is_number(entry.get(name)) for name in self._numbers):
                    continue
                if entry["time"] > self._skip_until:
                    self._newest_time = max(self._newest_time, entry["time"])
                    yield entry
