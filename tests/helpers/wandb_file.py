"""Read the `.wandb` file that wandb wrote: a log of protobuf records in LevelDB's format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER_BYTES = 7  # file header; then per chunk: checksum (4), length (2), kind (1)
BLOCK_BYTES = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[Any]:
    """Yield each record of the file as `wandb.proto.wandb_internal_pb2.Record`."""
    from wandb.proto import wandb_internal_pb2

    whole = b""
    for kind, chunk in _iter_chunks(path.read_bytes()):
        whole = chunk if kind in (FULL, FIRST) else whole + chunk
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the logged rows."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in read_records(path)
        if record.HasField("history")
    ]


def read_summary(path: Path) -> dict[str, Any]:
    """Return the summary: the last value of each name."""
    found = {}
    for record in read_records(path):
        for item in record.summary.update:
            found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return found


def read_exit_code(path: Path) -> int:
    """Return the exit code that wandb recorded; it shows a run as failed unless it is 0."""
    return next(int(record.exit.exit_code) for record in read_records(path) if record.HasField("exit"))


def _iter_chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = HEADER_BYTES
    while position + HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < HEADER_BYTES:  # the end of a block that is too short for a header is padding
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            return
        start = position + HEADER_BYTES
        yield kind, data[start : start + length]
        position = start + length
