"""The JSONL sink, always on: `metrics.jsonl`, `events.jsonl` and, at each `plan` event, `plan.json`.

The files are in the run directory. JSON has no NaN or infinity, so these are written as `null`. Numbers keep their
full precision.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.system.atomic_files import SHARED_MODE, atomic_write_text
from launcher.system.jsonl import parse_json_object
from launcher.system.run_files import EVENTS_FILE, METRICS_FILE, PLAN_FILE
from launcher.telemetry.records import Event, MetricsRow

__all__ = ["JsonlSink", "append_line", "append_line_concurrently", "to_json_line"]

BLOCK_BYTES = 65536


class JsonlSink:
    """Appends one whole line per write, so that a kill at any time leaves all earlier lines intact."""

    lossless = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metrics = LineFile(folder / METRICS_FILE)
        self._events = LineFile(folder / EVENTS_FILE)

    def write(self, entry: MetricsRow | Event) -> None:
        """Append one row or event.

        Raises:
            OSError: nothing of the entry was written; the write may be retried.
        """
        file = self._metrics if isinstance(entry, MetricsRow) else self._events
        file.append(to_json_line(entry))
        if isinstance(entry, Event) and entry.event == "plan":
            plan = {key: value for key, value in entry.fields.items() if key not in ("why", "from")}
            atomic_write_text(self._folder / PLAN_FILE, json.dumps(plan, indent=1, default=_convert_scalar) + "\n")

    def close(self) -> None:
        self._metrics.close()
        self._events.close()


class LineFile:
    """A file of lines."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path, flags, SHARED_MODE)
        self._rest = b""
        _repair_last_line(self._fd)

    def append(self, line: bytes) -> None:
        self._write_remainder()
        self._rest = line[os.write(self._fd, line) :]
        with suppress(OSError):  # the line was begun, so it counts as written; its rest is written before the next line
            self._write_remainder()

    def close(self) -> None:
        if self._fd >= 0:
            self._write_remainder()
            os.close(self._fd)
            self._fd = -1

    def _write_remainder(self) -> None:
        while self._rest:
            self._rest = self._rest[os.write(self._fd, self._rest) :]


def append_line(path: Path, entry: MetricsRow | Event) -> None:
    """Append one line to a file that no other process is writing to."""
    file = LineFile(path)
    try:
        file.append(to_json_line(entry))
    finally:
        file.close()


def append_line_concurrently(path: Path, entry: MetricsRow | Event) -> None:
    """Append one line to a file that rank 0 may be writing to: a single append write keeps both lines whole."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, SHARED_MODE)
    try:
        os.write(fd, to_json_line(entry))
    finally:
        os.close(fd)


def to_json_line(entry: MetricsRow | Event) -> bytes:
    """Encode one JSON object and a newline: first the position fields, then the values in their own order."""
    row = _make_row(entry)
    try:
        text = ENCODER.encode(row)
    except ValueError:  # a value is not finite, which is rare: only then is the row traversed
        text = ENCODER.encode(_replace_non_finite(row))
    return text.encode() + b"\n"


def _make_row(entry: MetricsRow | Event) -> dict[str, Any]:
    if isinstance(entry, Event):
        return {"time": entry.time, "event": entry.event, **entry.fields}
    return {
        "time": entry.time,
        "samples": entry.samples,
        "update": entry.update,
        "epoch": entry.epoch,
        "world": entry.world,
        "generation": entry.generation,
        **entry.values,
    }


def _convert_scalar(value: Any) -> Any:
    """Fallback for types unknown to JSON: numpy and torch scalars as numbers, anything else as `str`."""
    return _replace_non_finite(value.item()) if hasattr(value, "item") else str(value)


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item) for item in value]
    return value


ENCODER = json.JSONEncoder(default=_convert_scalar, allow_nan=False)


def _repair_last_line(fd: int) -> None:
    """Repair a last line that a killed writer left incomplete: add the newline to a whole object, else truncate."""
    size = os.fstat(fd).st_size
    tail = _read_last_line(fd, size)
    if not tail:
        return
    if parse_json_object(tail) is None:
        os.ftruncate(fd, size - len(tail))
    else:
        os.write(fd, b"\n")


def _read_last_line(fd: int, size: int) -> bytes:
    """The bytes after the last newline; empty if the file ends with a newline."""
    tail, start = b"", size
    while start > 0 and b"\n" not in tail:
        length = min(BLOCK_BYTES, start)
        start -= length
        tail = os.pread(fd, length, start) + tail
    return tail.rpartition(b"\n")[2]
